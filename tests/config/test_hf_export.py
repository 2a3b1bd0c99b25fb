"""config.json written from our description is read back as that description."""

from dataclasses import replace

import pytest

from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.hf_export import config_to_hf, end_ids, generation_config
from megatron_vl.config.model import ModelConfig, VisionConfig
from megatron_vl.config.presets import PRESETS, STEP3_VL_10B
from megatron_vl.config.rope import RopeScaling
from megatron_vl.errors import ConfigErrors
from tests.fixtures.paths import TINY_A
from tests.fixtures.small import SMALL, WIDE


@pytest.mark.parametrize("model", [*PRESETS.values(), SMALL, WIDE], ids=[*PRESETS, "small", "wide"])
def test_the_reader_gets_the_model_back(model):
    assert model_from_hf(config_to_hf(model, "bfloat16")) == model


def test_every_copied_field_carries_its_value():
    model = ModelConfig(
        vision=replace(
            STEP3_VL_10B.vision, image_size=98, crop_size=56, hidden_size=48, num_layers=2, num_attention_heads=2,
            ffn_hidden_size=131, layernorm_epsilon=1e-6, layer_scale_init=0.3,
        ),
        text=replace(
            STEP3_VL_10B.text, hidden_size=40, num_layers=5, num_attention_heads=6, num_query_groups=2, kv_channels=10,
            ffn_hidden_size=77, vocab_size=509, rotary_base=5000.5, layernorm_epsilon=1e-5,
            max_position_embeddings=77, init_method_std=0.1,
        ),
        tokens=replace(STEP3_VL_10B.tokens, im_patch=3, think_end=4),
        freeze_vision=True,
    )  # fmt: skip
    read = model_from_hf(config_to_hf(model, "float32"))
    assert read == replace(model, freeze_vision=False)


YARN = RopeScaling("yarn", None, 2.0, 65536, attention_factor=1.25)


def test_an_extended_rope_is_written():
    model = replace(STEP3_VL_10B, text=replace(STEP3_VL_10B.text, rope_scaling=YARN))
    config = config_to_hf(model, "bfloat16")
    assert config["text_config"]["rope_scaling"]["rope_type"] == "yarn" and model_from_hf(config) == model
    other = replace(STEP3_VL_10B, text=replace(STEP3_VL_10B.text, rope_scaling=RopeScaling("theta", 5e6)))
    text = config_to_hf(other, "bfloat16")["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (5e6, None)


def test_the_released_model_needs_no_field_of_our_own():
    config = config_to_hf(STEP3_VL_10B, "bfloat16")
    assert "special_token_ids" not in config
    assert config["image_token_id"] == 151679
    assert (config["image_token_len"], config["patch_token_len"]) == (169, 81)
    assert config["text_config"]["eos_token_id"] == [151643, 151645, 151679]
    assert generation_config(STEP3_VL_10B) == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "eos_token_id": [151643, 151645, 151679],
    }  # fmt: skip


def test_it_agrees_with_a_released_style_file_in_every_field():
    import json

    given = json.loads((TINY_A / "config.json").read_text())
    made = config_to_hf(model_from_hf(TINY_A), given["torch_dtype"])
    for section in ("vision_config", "text_config"):
        part = given.pop(section)
        part.pop("max_window_layers", None)
        assert {name: made[section][name] for name in part} == part
        made.pop(section)
    assert made == given
    assert (
        end_ids(model_from_hf(TINY_A))
        == json.loads((TINY_A / "generation_config.json").read_text())["eos_token_id"]
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"crop_size": 70}, "crop_size"), ({"rotary_base": 500.0}, "rotary_base")],
)
def test_what_the_released_layout_cannot_say_is_refused(changes, field):
    model = ModelConfig(vision=replace(VisionConfig(), **changes))
    with pytest.raises(ConfigErrors, match=f"model.vision.{field}.*can only say"):
        config_to_hf(model, "bfloat16")
