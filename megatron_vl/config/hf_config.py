"""A model description from a config.json in the released Hugging Face layout.

Fields that the file leaves out take the released values, as the released code does. Fields that ask for
something this package does not implement are refused. Fields that do not change the computation are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_vl.config.convert import FAILED, to_type
from megatron_vl.config.key import Limits
from megatron_vl.config.model import ModelConfig, SpecialTokens, TextConfig, VisionConfig, halved
from megatron_vl.config.rope import rope_scaling_from_hf
from megatron_vl.errors import ConfigErrors, Problem, raise_if_any

# Our name -> released name, for fields that are copied as they are.
VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_layers": "layers",
    "num_attention_heads": "heads",
    "layernorm_epsilon": "layer_norm_eps",
    "layer_scale_init": "ls_init_value",
}
TEXT_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "layernorm_epsilon": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "init_method_std": "initializer_range",
}
RELEASED_MLP_RATIO = 8960 / 1536

# Section, field, the only value that is implemented. A field that is left out (or null) has that value.
ONLY: tuple[tuple[str, str, Any], ...] = (
    ("", "model_type", "step_robotics"),
    ("", "projector_bias", False),
    ("", "tie_word_embeddings", False),
    ("", "vision_select_layer", -1),
    ("vision_config", "hidden_act", "quick_gelu"),
    ("vision_config", "use_cls_token", False),
    ("vision_config", "ues_cls_token", False),  # the released file spells it so
    ("vision_config", "use_ln_pre", True),
    ("vision_config", "use_ln_post", False),
    ("vision_config", "use_abs_posemb", True),
    ("vision_config", "use_rope2d", True),
    ("vision_config", "pool_type", "none"),
    ("vision_config", "output_dim", None),
    ("text_config", "model_type", "qwen3"),
    ("text_config", "hidden_act", "silu"),
    ("text_config", "attention_bias", False),
    ("text_config", "attention_dropout", 0.0),
    ("text_config", "tie_word_embeddings", False),
    ("text_config", "use_sliding_window", False),
)

# Token text in added_tokens.json -> our name.
TOKEN_TEXTS = {
    "<|endoftext|>": "endoftext",
    "<|im_start|>": "chat_start",
    "<|im_end|>": "chat_end",
    "<think>": "think_start",
    "</think>": "think_end",
    "<im_patch>": "im_patch",
    "<im_start>": "im_start",
    "<im_end>": "im_end",
    "<patch_start>": "patch_start",
    "<patch_end>": "patch_end",
    "<patch_newline>": "patch_newline",
}


def model_from_hf(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """The model that a released-style configuration describes.

    source: a folder with config.json (and perhaps added_tokens.json), or the parsed content of config.json.
    Special token ids come from, later wins: the released ids, added_tokens.json, `image_token_id`, and the
    object `special_token_ids` (our own addition to the format). Raises ConfigErrors with every problem.
    """
    if isinstance(source, Mapping):
        config, added = source, {}
    else:
        config = read_json_object(Path(source) / "config.json", required=True)
        added = read_json_object(Path(source) / "added_tokens.json", required=False)
    reader = _Reader(config)
    reader.check_implemented()
    vision, text, tokens = _vision(reader), _text(reader), _tokens(reader, added)
    raise_if_any(reader.problems)
    return ModelConfig(vision=vision, text=text, tokens=tokens)


def read_json_object(path: Path, required: bool) -> dict[str, Any]:
    """A JSON file that holds an object; {} for a missing file that is not required. Raises ConfigErrors."""
    if not required and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        rule, remedy = (
            f"cannot be read ({error.strerror})",
            "give a folder in the released Hugging Face layout",
        )
    except ValueError as error:
        rule, remedy = f"is not JSON ({error})", "correct the file or download it again"
    else:
        if isinstance(content, dict):
            return content
        rule, remedy = "must hold a JSON object", "correct the file or download it again"
    raise ConfigErrors([Problem(str(path), None, rule, remedy, show_value=False)])


class _Reader:
    """Typed access to the fields of a config.json; collects problems instead of raising."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.problems: list[Problem] = []
        for name in ("vision_config", "text_config"):
            if not isinstance(config.get(name) or {}, Mapping):
                self.refuse(name, config[name], "must be an object", "correct the file")

    def refuse(self, path: str, value: Any, rule: str, remedy: str) -> None:
        """Adds a problem."""
        self.problems.append(Problem(path, value, rule, remedy))

    def section(self, name: str) -> Mapping[str, Any]:
        """`vision_config`, `text_config` or, with an empty name, the root."""
        part = self.config.get(name) if name else self.config
        return part if isinstance(part, Mapping) else {}

    def value(self, section: str, name: str, hint: type, default: Any, limits: Limits) -> Any:
        """A field as `hint`, or `default` when it is left out, null or wrong (then a problem is noted)."""
        value = self.section(section).get(name)
        if value is None:
            return default
        path = f"{section}.{name}" if section else name
        result = to_type(hint, value, path, limits, self.problems)
        return default if result is FAILED else result

    def copied(self, section: str, cls: type, names: Mapping[str, str]) -> Any:
        """An instance of `cls` whose fields `names` are read under their released names."""
        released = cls()
        limits = {field.name: field.metadata["limits"] for field in fields(cls)}
        return replace(
            released,
            **{
                ours: self.value(
                    section, theirs, type(getattr(released, ours)), getattr(released, ours), limits[ours]
                )
                for ours, theirs in names.items()
            },
        )

    def check_implemented(self) -> None:
        """Refuses every field whose value asks for something else than what is implemented."""
        for section, name, implemented in ONLY:
            value = self.section(section).get(name)
            if value is None or value == implemented:
                continue
            path = f"{section}.{name}" if section else name
            wanted = json.dumps(implemented)
            self.refuse(path, value, f"only {wanted} is implemented", f"use a checkpoint with {wanted}")
        layer_types = self.section("text_config").get("layer_types")
        if isinstance(layer_types, list) and set(map(str, layer_types)) - {"full_attention"}:
            rule, remedy = (
                "only full_attention layers are implemented",
                "use a checkpoint without sliding windows",
            )
            self.refuse("text_config.layer_types", layer_types, rule, remedy)


def _vision(reader: _Reader) -> VisionConfig:
    vision = reader.copied("vision_config", VisionConfig, VISION_FIELDS)
    ratio = reader.value("vision_config", "mlp_ratio", float, RELEASED_MLP_RATIO, Limits(above=0))
    tokens_of_crop = reader.value("", "patch_token_len", int, VisionConfig().crop_tokens, Limits(at_least=1))
    side = math.isqrt(tokens_of_crop)
    if side * side != tokens_of_crop:
        near = f"{side**2} or {(side + 1) ** 2}"
        reader.refuse("patch_token_len", tokens_of_crop, "must be a perfect square", f"e.g. {near}")
    tokens_of_image = reader.value("", "image_token_len", int, vision.global_tokens, Limits(at_least=1))
    if tokens_of_image != vision.global_tokens:
        grid, down = vision.global_grid, halved(halved(vision.global_grid))
        reader.refuse(
            "image_token_len",
            tokens_of_image,
            f"image_size {vision.image_size} with patch_size {vision.patch_size} gives a grid of {grid} "
            f"x {grid}, "
            f"downsampled {down} x {down} = {vision.global_tokens} tokens",
            f"set image_token_len {vision.global_tokens} or correct image_size",
        )
    return replace(
        vision, crop_size=4 * side * vision.patch_size, ffn_hidden_size=_whole(vision.hidden_size * ratio)
    )


def _text(reader: _Reader) -> TextConfig:
    """The decoder. Newer files keep the base of the rotary embedding in `rope_parameters`."""
    text = reader.copied("text_config", TextConfig, TEXT_FIELDS)
    section = reader.section("text_config")
    scaling = rope_scaling_from_hf(section, text.max_position_embeddings, reader.problems)
    text = replace(text, rope_scaling=scaling)
    base = reader.value("text_config", "rope_theta", float, None, Limits(above=0))
    rope = reader.section("text_config").get("rope_parameters") or {}
    if not isinstance(rope, Mapping):  # noted above
        rope = {}
    if rope.get("rope_theta") is not None:
        path = "text_config.rope_parameters.rope_theta"
        newer = to_type(float, rope["rope_theta"], path, Limits(above=0), reader.problems)
        if base is not None and newer is not FAILED and newer != base:
            reader.refuse(
                path, newer, f"differs from text_config.rope_theta = {base}", "remove one of the two"
            )
        elif newer is not FAILED:
            base = newer
    return text if base is None else replace(text, rotary_base=base)


def _tokens(reader: _Reader, added: Mapping[str, Any]) -> SpecialTokens:
    limits = Limits(at_least=0)
    ids: dict[str, Any] = {}
    for text, name in TOKEN_TEXTS.items():
        if text in added:
            ids[name] = to_type(int, added[text], f"added_tokens.json {text}", limits, reader.problems)
    given = reader.section("").get("special_token_ids") or {}
    if not isinstance(given, Mapping):
        reader.refuse("special_token_ids", given, "must be an object", "correct the file")
        given = {}
    patch = reader.value("", "image_token_id", int, None, limits)
    if patch is not None:
        ids["im_patch"] = patch
    for name, value in given.items():
        path = f"special_token_ids.{name}"
        if name not in TOKEN_TEXTS.values():
            reader.refuse(path, value, "unknown token", f"the tokens are {', '.join(TOKEN_TEXTS.values())}")
            continue
        ids[name] = to_type(int, value, path, limits, reader.problems)
        if name == "im_patch" and patch is not None and ids[name] is not FAILED and ids[name] != patch:
            reader.refuse(path, value, f"differs from image_token_id = {patch}", "make the two equal")
    return SpecialTokens(**{name: value for name, value in ids.items() if value is not FAILED})


def _whole(width: float) -> int:
    """Truncated as in the released code, after removing the rounding error of a ratio such as 8960 / 1536."""
    nearest = round(width)
    return nearest if abs(width - nearest) < 1e-3 else int(width)
