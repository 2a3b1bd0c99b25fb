"""The files beside the weights of an export: copied from another Hugging Face folder, or written from our config."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from megatron_vl.checkpoint.weights import Weight
from megatron_vl.config.hf_config import model_from_hf, read_json_object
from megatron_vl.config.hf_export import config_to_hf, generation_config
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.same_model import check_same_model

CONFIG, GENERATION = "config.json", "generation_config.json"
# What a template may contribute; remote code (*.py) and chat templates (*.jinja) come by their ending.
COPIED = (
    CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
ENDINGS = (".py", ".jinja")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def check_template(template: Path, model: ModelConfig) -> None:
    """Refuse a template of another model, before anything is written.

    Raises:
        ConfigErrors: no config.json that can be read, or every field of it that differs.
    """
    remedy = "give --hf-template a folder of this very model, or leave it out"
    check_same_model(model_from_hf(template), model, f"{template}/{CONFIG}", remedy)


def write_companions(
    folder: Path, model: ModelConfig, template: Path | None, weights: Mapping[str, Weight]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Write the files into ``folder``; returns (file, where from) and notes worth telling.

    Raises:
        OSError: one cannot be read or written.
    """
    written, notes = [], []
    if template is not None:
        names, left = sorted_out(template)
        for name in names:
            shutil.copyfile(template / name, folder / name)  # content only: a template may be read-only
            written.append((name, str(template)))
        if left:
            notes.append(f"not copied from {template}: {', '.join(left)}")
    dtype = most_common_dtype(weights)
    own = {CONFIG: lambda: config_to_hf(model, dtype), GENERATION: lambda: generation_config(model)}
    for name, content in own.items():
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps(content(), indent=2) + "\n", encoding="utf-8")
            written.append((name, "our configuration"))
    config = read_json_object(folder / CONFIG, required=True)
    told = config.get("torch_dtype") or config.get("dtype")
    if isinstance(told, str) and told != dtype:
        notes.append(f"{CONFIG} says {told}, most of the tensors are {dtype}: loaders that obey it convert")
    if not any(folder.glob("*.py")) and config.get("auto_map"):
        notes.append(
            "no remote code (*.py): transformers cannot load the whole model; give --hf-template a folder that has it"
        )
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        notes.append("no tokenizer: give --hf-template a folder that has one")
    return sorted(written), notes


def sorted_out(template: Path) -> tuple[list[str], list[str]]:
    """Names of the files directly in the template that are copied, and of those that are not, weights left out."""
    names, left = [], []
    for path in sorted(template.iterdir()):
        if not path.is_file():  # a link to a file counts: caches of downloads consist of them
            continue
        if path.name in COPIED or path.suffix in ENDINGS:
            names.append(path.name)
        elif not path.name.endswith(WEIGHTS):
            left.append(path.name)
    return names, left


def most_common_dtype(weights: Mapping[str, Weight]) -> str:
    """The number format of most values, as config.json names it, e.g. ``bfloat16``."""
    count: Counter = Counter()
    for weight in weights.values():
        count[weight.spec.dtype] += weight.spec.nbytes // weight.spec.dtype.itemsize
    return str(count.most_common(1)[0][0]).removeprefix("torch.")
