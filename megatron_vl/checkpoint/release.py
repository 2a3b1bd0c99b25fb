"""Is a downloaded release what this package takes it for? Tensors, configuration, token ids.

The engine behind tools/verify_release.py, together with parity/release_template.py and
parity/release_logits.py. What is expected, and where it was read: spec/model.md sections 5 to 7.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_vl.checkpoint.hf_load import INDEX, HFCheckpoint
from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.config.hf_config import (
    ONLY,
    TEXT_FIELDS,
    TOKEN_TEXTS,
    VISION_FIELDS,
    model_from_hf,
    read_json_object,
)
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.presets import PRESETS
from megatron_vl.errors import CheckpointError, ConfigError, ConfigErrors
from megatron_vl.plan.cost import parameters

OK, DIFFERS, SKIPPED = "ok", "differs", "skipped"
STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

# Section, field, released value: fields that change nothing here, so that config/ refuses no other value.
RELEASED: tuple[tuple[str, str, Any], ...] = (
    ("", "architectures", ["StepVLForConditionalGeneration"]),
    ("", "auto_map", {
        "AutoConfig": "configuration_step_vl.StepRoboticsConfig",
        "AutoModelForCausalLM": "modeling_step_vl.Step3VL10BForCausalLM",
    }),
    ("", "im_start_token", "<im_start>"),
    ("", "im_end_token", "<im_end>"),
    ("", "im_patch_token", "<im_patch>"),
    ("", "understand_projector_stride", 2),
    ("", "use_im_start_end", "true"),
    ("vision_config", "num_channels", 3),
    ("text_config", "architectures", ["Qwen3ForCausalLM"]),
    ("text_config", "sliding_window", None),
)  # fmt: skip
# Read elsewhere (config/hf_config.py, or below), or without a meaning for training.
OTHER_FIELDS = {
    "": ("vision_config", "text_config", "image_token_id", "image_token_len", "patch_token_len", "dtype",
         "torch_dtype", "transformers_version", "special_token_ids"),
    "vision_config": ("mlp_ratio", "torch_dtype", "dtype"),
    "text_config": ("rope_theta", "rope_parameters", "layer_types", "bos_token_id", "eos_token_id",
                    "max_window_layers", "use_cache", "torch_dtype", "dtype"),
}  # fmt: skip
# Fields of ours that are not copied: where the file says them.
DERIVED = {
    "vision.crop_size": "patch_token_len",
    "vision.ffn_hidden_size": "vision_config.mlp_ratio",
    "text.rotary_base": "text_config.rope_theta",
}
GENERATION = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


@dataclass
class Check:
    """One line of the report. status: ok, differs or skipped. notes: worth reading, but no difference."""

    name: str
    status: str
    summary: str
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, what: str, differences: list[str], notes: list[str] | None = None) -> Check:
        """ok without differences. what: the sentence about that which was compared."""
        count = len(differences)
        found = f"{count} difference{'s' if count > 1 else ''}; " if count else ""
        return cls(name, DIFFERS if count else OK, found + what, differences, notes or [])


@dataclass(frozen=True)
class Expected:
    """The description that a directory is held against. dtype: safetensors name of every tensor's format."""

    name: str
    model: ModelConfig
    dtype: str


def expected_release(source: str) -> Expected:
    """A preset by name, or the model of a directory with a config.json.

    Raises:
        ConfigError: neither of the two, or a config.json that is not understood.
    """
    if source in PRESETS:
        return Expected(f"preset {source}", PRESETS[source], "BF16")
    if not Path(source).is_dir():
        raise ConfigError(f"--model-from = {source}: neither a preset ({', '.join(PRESETS)}) nor a folder")
    config = read_json_object(Path(source) / "config.json", required=True)
    return Expected(source, model_from_hf(source), STORED_AS.get(_dtype(config), "BF16"))


def check_tensors(directory: Path, expected: Expected) -> Check:
    """Names, shapes and dtypes of every tensor, shards against index, total size. No weight is read."""
    shapes = expected_tensors(expected.model)
    want = f"expected {len(shapes):,} tensors, {parameters(expected.model)['total']:,} parameters"
    try:
        checkpoint = HFCheckpoint(directory)
        found = checkpoint.differences(expected.model)
        stored = dict(_stored(checkpoint))
    except CheckpointError as error:
        return Check.of("tensors", want, [str(error)])
    found += [
        f"dtype: {name} is {dtype}, the release has {expected.dtype}"
        for name, (_, dtype) in stored.items()
        if name in shapes and dtype != expected.dtype
    ]
    count = sum(math.prod(shape) for shape, _ in stored.values())
    found += _total_size(directory, stored)
    return Check.of("tensors", f"{len(checkpoint.files):,} tensors, {count:,} parameters; {want}", found)


def _stored(checkpoint: HFCheckpoint) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Shape and dtype of each tensor that the index names and its shard holds."""
    for name in sorted(checkpoint.files):
        try:
            yield name, checkpoint.shape_and_dtype(name)
        except CheckpointError:
            continue  # `differences` has listed it as missing from its shard


def _total_size(directory: Path, stored: Mapping[str, tuple[tuple[int, ...], str]]) -> list[str]:
    """The bytes that the index declares against the sum over the tensors."""
    path = directory / INDEX
    metadata = json.loads(path.read_text(encoding="utf-8")).get("metadata") if path.is_file() else None
    declared = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
    actual = sum(math.prod(shape) * sizes.get(dtype, 1) for shape, dtype in stored.values())
    if declared is None or declared == actual:
        return []
    return [f"total_size: {INDEX} declares {declared} bytes, its tensors have {actual}"]


def check_config(directory: Path, expected: Expected) -> Check:
    """Every field of config.json; unknown and left-out fields become notes."""
    what = f"config.json against {expected.name}"
    try:
        config = read_json_object(directory / "config.json", required=True)
        found = [*_model_differences(directory, expected.model)]
    except ConfigErrors as error:
        return Check.of("config", what, [str(problem) for problem in error.problems])
    found += [
        f"{path} = {json.dumps(value)}, the release has {json.dumps(wanted)}"
        for path, value, wanted in _other_values(config, expected)
        if value != wanted
    ]
    return Check.of("config", what, found, _notes(config))


def _model_differences(directory: Path, expected: ModelConfig) -> Iterator[str]:
    """What `model_from_hf` reads, field by field, under the released names.

    Raises:
        ConfigErrors: a field that asks for something which is not implemented.
    """
    found = model_from_hf(directory)
    sections = (("vision", "vision_config", VISION_FIELDS), ("text", "text_config", TEXT_FIELDS))
    for part, section, names in sections:
        mine, wanted = getattr(found, part), getattr(expected, part)
        for entry in fields(wanted):
            value, other = getattr(mine, entry.name), getattr(wanted, entry.name)
            if value != other:
                ours_path = f"{part}.{entry.name}"
                path = DERIVED.get(ours_path) or f"{section}.{names.get(entry.name, entry.name)}"
                yield f"{path}: gives {ours_path} = {value}, expected {other}"
    for name, value in asdict(expected.tokens).items():
        if getattr(found.tokens, name) != value:
            yield f"token id: {name} = {getattr(found.tokens, name)}, expected {value}"


def _other_values(config: Mapping[str, Any], expected: Expected) -> Iterator[tuple[str, Any, Any]]:
    """(path, value, released value) of the fields of `RELEASED`, of bos, eos and dtype that the file has."""
    tokens = expected.model.tokens
    ends = [tokens.endoftext, tokens.chat_end, tokens.im_patch]
    table = [
        *RELEASED,
        ("text_config", "bos_token_id", tokens.endoftext),
        ("text_config", "eos_token_id", ends),
    ]
    for section, name, wanted in table:
        part = config.get(section) if section else config
        if isinstance(part, Mapping) and name in part:
            yield f"{section}.{name}" if section else name, part[name], wanted
    if _dtype(config) is not None:
        yield "torch_dtype", _dtype(config), {v: k for k, v in STORED_AS.items()}.get(expected.dtype)


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The number format that the file names, under its older or newer key."""
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else {}
    named = [part.get(key) for part in (config, text) for key in ("torch_dtype", "dtype")]
    return next((name for name in named if isinstance(name, str)), None)


def _notes(config: Mapping[str, Any]) -> list[str]:
    """Fields that nothing here knows, and fields whose released value had to be assumed."""
    unknown, absent = [], []
    for section, copied in (("", {}), ("vision_config", VISION_FIELDS), ("text_config", TEXT_FIELDS)):
        part = config.get(section) if section else config
        part = part if isinstance(part, Mapping) else {}
        fixed = [name for where, name, _ in (*ONLY, *RELEASED) if where == section]
        known = {*copied.values(), *fixed, *OTHER_FIELDS[section]}
        dotted = f"{section}." if section else ""
        unknown += [
            f"{dotted}{name} = {json.dumps(part[name])[:100]}" for name in sorted(part) if name not in known
        ]
        absent += [f"{dotted}{name}" for name in copied.values() if name not in part]
    notes = [f"unknown field: {text}" for text in unknown]
    return notes + ([f"left out, so the released values are assumed: {', '.join(absent)}"] if absent else [])


def check_generation_config(directory: Path, expected: Expected) -> Check:
    """The ids that end generation, and the sampling defaults."""
    name, path = "generation_config", directory / "generation_config.json"
    if not path.is_file():
        return Check(name, SKIPPED, "no generation_config.json")
    try:
        config = read_json_object(path, required=True)
    except ConfigErrors as error:
        return Check.of(name, "generation_config.json", [str(problem) for problem in error.problems])
    tokens = expected.model.tokens
    wanted = {**GENERATION, "eos_token_id": [tokens.endoftext, tokens.chat_end, tokens.im_patch]}
    found = [
        f"{key} = {json.dumps(config.get(key))}, the release has {json.dumps(value)}"
        for key, value in wanted.items()
        if config.get(key) != value
    ]
    return Check.of(name, "eos_token_id, temperature, top_p, top_k of generation_config.json", found)


def check_tokens(directory: Path, expected: Expected) -> Check:
    """The id of every special token in every file of the tokenizer that names it."""
    found, read = [], []
    for file, reader in TOKEN_FILES.items():
        path = directory / file
        if not path.is_file():
            continue
        read.append(file)
        try:
            ids = reader(read_json_object(path, required=True))
        except (ConfigErrors, TypeError, KeyError, ValueError, AttributeError) as error:
            found.append(f"{file}: is not in the expected form ({type(error).__name__}: {error})")
            continue
        for text, name in TOKEN_TEXTS.items():
            wanted = getattr(expected.model.tokens, name)
            if ids.get(text) != wanted:
                found.append(f"{file}: {text} has id {ids.get(text, 'none')}, expected {wanted}")
    if not read:
        return Check("tokens", SKIPPED, f"none of {', '.join(TOKEN_FILES)} is there")
    return Check.of("tokens", f"{len(TOKEN_TEXTS)} special token ids in {', '.join(read)}", found)


# File -> how to read the ids of its special tokens.
TOKEN_FILES = {
    "added_tokens.json": dict,
    "tokenizer_config.json": lambda content: {
        token["content"]: int(number) for number, token in content["added_tokens_decoder"].items()
    },
    "tokenizer.json": lambda content: {token["content"]: token["id"] for token in content["added_tokens"]},
}
