"""Rules between the dimensions of a model. The problems carry paths below `model`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from megatron_vl.config.model import ModelConfig
from megatron_vl.errors import Problem
from megatron_vl.plan.rope import check_rope_scaling


def check_model(model: ModelConfig) -> list[Problem]:
    """Dimensions of the model that contradict each other."""
    scaling = check_rope_scaling(model.text.rope_scaling)
    return [*_vision_dimensions(model), *_text_dimensions(model), *scaling, *_frozen(model)]


def divides(path: str, size: int, values: Mapping[str, int], why: str = "") -> Iterator[Problem]:
    """A problem for each named value that `size` does not divide."""
    for name, value in values.items():
        if value % size:
            fitting = [n for n in range(1, value + 1) if value % n == 0]
            near = ", ".join(str(n) for n in fitting if n <= 2 * size)
            yield Problem(path, size, f"must divide {name} = {value}{why}", f"choose one of {near}")


def _vision_dimensions(model: ModelConfig) -> Iterator[Problem]:
    vision = model.vision
    if vision.hidden_size % vision.num_attention_heads:
        yield from divides(
            "model.vision.num_attention_heads",
            vision.num_attention_heads,
            {"vision.hidden_size": vision.hidden_size},
        )
    elif vision.head_dim % 4:
        yield Problem(
            "model.vision.num_attention_heads",
            vision.num_attention_heads,
            f"gives heads of {vision.head_dim} channels, but RoPE-2D needs a multiple of 4 (pairs on "
            f"two axes)",
            "change the number of heads or vision.hidden_size",
        )
    sides = {"image_size": vision.image_size, "crop_size": vision.crop_size}
    for name, side in sides.items():
        if side % vision.patch_size:
            below = side // vision.patch_size * vision.patch_size
            yield Problem(
                f"model.vision.{name}",
                side,
                f"must be a multiple of vision.patch_size = {vision.patch_size}",
                f"choose {below or vision.patch_size} or {below + vision.patch_size}",
            )


def _text_dimensions(model: ModelConfig) -> Iterator[Problem]:
    text = model.text
    if text.num_attention_heads % text.num_query_groups:
        yield from divides(
            "model.text.num_query_groups",
            text.num_query_groups,
            {"text.num_attention_heads": text.num_attention_heads},
        )
    if text.kv_channels % 2:
        yield Problem(
            "model.text.kv_channels",
            text.kv_channels,
            "must be even: RoPE turns pairs of channels",
            "add one",
        )


def check_token_ids(model: ModelConfig) -> Iterator[Problem]:
    """Special tokens outside the vocabulary, or sharing an id. Needed to train, not to describe a model."""
    owner: dict[int, str] = {}
    for field in fields(model.tokens):
        path, value = f"model.tokens.{field.name}", getattr(model.tokens, field.name)
        if value >= model.text.vocab_size:
            yield Problem(
                path,
                value,
                f"must be below model.text.vocab_size = {model.text.vocab_size}",
                "give the token an id of this vocabulary",
            )
        if value in owner:
            yield Problem(path, value, f"is also the id of {owner[value]}", "give every token its own id")
        owner.setdefault(value, path)


def _frozen(model: ModelConfig) -> Iterator[Problem]:
    if model.freeze_vision and model.freeze_projector and model.freeze_decoder:
        yield Problem(
            "model.freeze_decoder",
            True,
            "nothing is left to train: tower, projector and decoder are all frozen",
            "unfreeze at least one of them",
        )
