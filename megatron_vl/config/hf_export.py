"""config.json and generation_config.json of an export, from our description: the inverse of `hf_config`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from megatron_vl.config.hf_config import TEXT_FIELDS, VISION_FIELDS, model_from_hf
from megatron_vl.config.model import ModelConfig, SpecialTokens
from megatron_vl.config.rope import rope_scaling_to_hf
from megatron_vl.config.same_model import PARTS, with_plain_base
from megatron_vl.errors import ConfigErrors, Problem

# spec/model.md 6.1. Names of the release's own code, which an export does not write by itself.
ARCHITECTURES = ["StepVLForConditionalGeneration"]
AUTO_MAP = {
    "AutoConfig": "configuration_step_vl.StepRoboticsConfig",
    "AutoModelForCausalLM": "modeling_step_vl.Step3VL10BForCausalLM",
}


def config_to_hf(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Content of config.json in the released layout. dtype: of the weights, e.g. ``bfloat16``.

    `model_from_hf` of the result is the model again, but for what is frozen and for `rope_scaling.kind = theta`, which
    is another base there. Token ids that are not the released ones stand in `special_token_ids`, our own addition.

    Raises:
        ConfigErrors: the released layout has no field for something that the model needs.
    """
    vision, text, tokens = model.vision, model.text, model.tokens
    config: dict[str, Any] = {
        "architectures": ARCHITECTURES,
        "auto_map": AUTO_MAP,
        "model_type": "step_robotics",
        "im_end_token": "<im_end>",
        "im_patch_token": "<im_patch>",
        "im_start_token": "<im_start>",
        "image_token_len": vision.global_tokens,
        "patch_token_len": vision.crop_tokens,
        "image_token_id": tokens.im_patch,
        "understand_projector_stride": 2,
        "use_im_start_end": "true",
        "vision_select_layer": -1,
        "projector_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    if tokens != SpecialTokens():
        config["special_token_ids"] = asdict(tokens)
    config["vision_config"] = {theirs: getattr(vision, ours) for ours, theirs in VISION_FIELDS.items()} | {
        "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size,
        "pool_type": "none",
        "output_dim": None,
        "use_cls_token": False,
        "use_ln_pre": True,
        "use_ln_post": False,
        "use_abs_posemb": True,
        "use_rope2d": True,
        "hidden_act": "quick_gelu",
    }
    config["text_config"] = {theirs: getattr(text, ours) for ours, theirs in TEXT_FIELDS.items()} | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokens.endoftext,
        "eos_token_id": end_ids(model),
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
    }
    config["text_config"] |= rope_scaling_to_hf(text.rotary_base, text.rope_scaling)
    _check_inverse(config, model)
    return config


def _check_inverse(config: dict[str, Any], model: ModelConfig) -> None:
    """The reader must get the same model back: a field without a place in the layout shows here."""
    model, read, problems = with_plain_base(model), model_from_hf(config), []
    for part in PARTS:
        ours, theirs = asdict(getattr(model, part)), asdict(getattr(read, part))
        problems += [
            Problem(
                f"model.{part}.{name}",
                value,
                f"the released layout of config.json can only say {theirs[name]}",
                "change it, or give --hf-template",
            )
            for name, value in ours.items()
            if value != theirs[name]
        ]
    if problems:
        raise ConfigErrors(problems)
    frozen = replace(model, freeze_vision=False, freeze_projector=False, freeze_decoder=False)
    assert read == frozen, "every part was compared"


def generation_config(model: ModelConfig) -> dict[str, Any]:
    """Content of generation_config.json: the released sampling defaults and the ids that end generation."""
    return {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "eos_token_id": end_ids(model)}


def end_ids(model: ModelConfig) -> list[int]:
    """Ids that end generation; among them `<im_patch>`, when it is sampled (spec/model.md section 7)."""
    tokens = model.tokens
    return [tokens.endoftext, tokens.chat_end, tokens.im_patch]
