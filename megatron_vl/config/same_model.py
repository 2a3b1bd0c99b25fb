"""Is the config.json beside some files that of this model? Shapes alone do not show a wrong rope base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.rope import RopeScaling
from megatron_vl.errors import Problem, raise_if_any

# Fields that only say how fresh weights are drawn or how long rows are meant to be.
NOT_COMPUTED = {"layer_scale_init", "init_method_std", "max_position_embeddings"}
PARTS = ("vision", "text", "tokens")


def with_plain_base(model: ModelConfig) -> ModelConfig:
    """The same computation in the released layout's words: ``rope_scaling.kind = theta`` is another base."""
    scaling = model.text.rope_scaling
    if scaling.kind != "theta" or scaling.theta is None:
        return model
    return replace(model, text=replace(model.text, rotary_base=scaling.theta, rope_scaling=RopeScaling()))


def model_differences(
    theirs: ModelConfig, ours: ModelConfig, parts: tuple[str, ...] = PARTS
) -> Iterator[tuple[str, Any, Any]]:
    """(path, our value, their value) of every field that differs and shapes the computation."""
    theirs, ours = with_plain_base(theirs), with_plain_base(ours)
    for part in parts:
        yield from _differences(part, getattr(theirs, part), getattr(ours, part))


def _differences(path: str, theirs: Any, ours: Any) -> Iterator[tuple[str, Any, Any]]:
    for field in fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if is_dataclass(mine):
            yield from _differences(f"{path}.{field.name}", other, mine)
        elif mine != other and field.name not in NOT_COMPUTED:
            yield f"{path}.{field.name}", mine, other


def check_same_model(
    theirs: ModelConfig, model: ModelConfig, where: str, remedy: str, may_extend: bool = False
) -> None:
    """Refuse weights or files that were made for another model. where: that says what ``theirs`` is.

    may_extend: the weights begin a new run, which may extend the rotary embedding of the same base. It may not drop
    an extension that the weights were trained with.

    Raises:
        ConfigErrors: every field that differs and shapes the computation.
    """
    text, scaling = theirs.text, model.text.rope_scaling
    if may_extend and scaling.kind != "none" and text.rotary_base == model.text.rotary_base:
        theirs = replace(theirs, text=replace(text, rope_scaling=scaling))
    raise_if_any(
        Problem(f"model.{path}", ours, f"{where} says {other}", remedy)
        for path, ours, other in model_differences(theirs, model)
    )
