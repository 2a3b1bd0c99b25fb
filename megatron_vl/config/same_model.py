"""Is the config.json beside some files that of this model? Shapes alone do not show a wrong rope base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megatron_vl.config.model import ModelConfig
from megatron_vl.errors import Problem, raise_if_any

# Fields that only say how fresh weights are drawn or how long rows are meant to be.
NOT_COMPUTED = {"layer_scale_init", "init_method_std", "max_position_embeddings"}
PARTS = ("vision", "text", "tokens")


def model_differences(
    theirs: ModelConfig, ours: ModelConfig, parts: tuple[str, ...] = PARTS
) -> Iterator[tuple[str, Any, Any]]:
    """(path, our value, their value) of every field that differs and shapes the computation."""
    for part in parts:
        here, there = getattr(ours, part), getattr(theirs, part)
        for field in fields(here):
            mine, other = getattr(here, field.name), getattr(there, field.name)
            if mine != other and field.name not in NOT_COMPUTED:
                yield f"{part}.{field.name}", mine, other


def check_same_model(theirs: ModelConfig, model: ModelConfig, where: str, remedy: str) -> None:
    """Refuse weights or files that were made for another model. where: that says what ``theirs`` is.

    Raises:
        ConfigErrors: every field that differs and shapes the computation.
    """
    raise_if_any(
        Problem(f"model.{path}", ours, f"{where} says {other}", remedy)
        for path, ours, other in model_differences(theirs, model)
    )
