"""Exported names under the release's key mapping are the names of its modules in memory (spec/model.md 6.3)."""

import re

from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.config.presets import STEP3_VL_10B
from megatron_vl.parity.release_logits import KEY_MAPPING


def in_memory(name: str) -> str:
    """Where the release's modules keep a tensor: all but the head nest below ``model.``."""
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name if name == "lm_head.weight" else "model." + name


def mapped_all(name: str) -> str:
    """Every rule after the other."""
    for pattern, replacement in KEY_MAPPING.items():
        name = re.sub(pattern, replacement, name)
    return name


def mapped_first(name: str) -> str:
    """Only the first rule that matches, as transformers does."""
    for pattern, replacement in KEY_MAPPING.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    return name


def test_every_exported_name_nests_where_the_modules_are():
    names = list(expected_tensors(STEP3_VL_10B))
    assert len(names) == 1066
    for mapped in (mapped_all, mapped_first):
        assert [mapped(name) for name in names] == [in_memory(name) for name in names]
        assert len({mapped(name) for name in names}) == len(names)
    assert mapped_all("vit_large_projector.weight") == "model.vit_large_projector.weight"
    assert (
        mapped_all("model.layers.3.mlp.up_proj.weight") == "model.language_model.layers.3.mlp.up_proj.weight"
    )
    assert mapped_all("vision_model.conv1.weight") == "model.vision_model.conv1.weight"


def test_without_the_mapping_the_decoder_would_stay_random():
    names = [name for name in expected_tensors(STEP3_VL_10B) if in_memory(name) != name]
    assert len(names) == 1065  # everything but the head
