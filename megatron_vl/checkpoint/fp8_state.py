"""Histories of largest values (delayed FP8 scaling) in checkpoints.

A history belongs to a weight and is the same on every rank that has a part of it, so one rank writes it, and it can be
read in any layout. The torch layers keep fp32 ``[steps, 3]`` (input, weight, gradient; `model/fp8_linear.py`).
Transformer Engine 2.11 keeps ``fp8_meta["scaling_fwd" | "scaling_bwd"]`` with ``amax_history`` ``[steps, tensors]`` and
``scale`` ``[tensors]`` in each linear, made when it first runs, which a restored one must do before. It offers them
pickled (``get_extra_state``); nothing pickled goes into our checkpoints. Never run with Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe

from megatron_vl.checkpoint.hf_names import global_name
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.checkpoint.torch_dist import Item
from megatron_vl.model.fp8_linear import delayed_scalings
from megatron_vl.plan.stages import Stage

PREFIX = "fp8"
DIRECTIONS = ("scaling_fwd", "scaling_bwd")


@dataclass(frozen=True)
class History:
    """One matrix of the state of one linear. fill: puts a stored one, fp32 ``[n, k]``, back into it."""

    key: str
    values: torch.Tensor
    fill: Callable[[torch.Tensor], None]


def histories(chunks: list[torch.nn.Module], stages: list[Stage]) -> Iterator[History]:
    """What the linears of this rank remember, in a fixed order."""
    for number, name, scaling in delayed_scalings(chunks):
        key = f"{PREFIX}/{global_name(name, stages[number].layers)}/history"
        yield History(key, scaling.history, scaling.fill)
    for chunk, stage in zip(chunks, stages):
        for name, module in chunk.named_modules():
            if isinstance(getattr(module, "fp8_meta", None), dict):
                yield from _of_engine(global_name(name, stage.layers), module)


def _of_engine(name: str, module: Any) -> Iterator[History]:
    """Scales and histories of a linear of Transformer Engine; none before it has run."""
    for direction in DIRECTIONS:
        state = module.fp8_meta.get(direction)
        if hasattr(state, "amax_history"):  # other recipes keep none
            key = f"{PREFIX}/{name}/{direction}"
            yield History(f"{key}/amax_history", state.amax_history, partial(_put, state.amax_history))
            scale = state.scale.view(1, -1)
            yield History(f"{key}/scale", scale, partial(_put, scale))


def _put(where: torch.Tensor, values: torch.Tensor) -> None:
    """The newest entries, as many as there is room for; zeros behind them."""
    count = min(len(values), len(where))
    where.zero_()
    where[:count] = values[:count].to(where)


def begin_engine(chunk: torch.nn.Module, recipe: Any) -> None:
    """Make the state of Transformer Engine's linears, as its ``set_extra_state`` does, so that it can be filled.

    recipe: its ``DelayedScaling``.
    """
    for module in chunk.modules():
        weight = getattr(module, "weight", None)  # its attention has fp8_meta too, and none
        if isinstance(getattr(module, "fp8_meta", None), dict) and isinstance(weight, torch.nn.Parameter):
            module.fp8_meta |= {"recipe": recipe, "num_gemms": 1}
            module.init_fp8_meta_tensors(recipe)


def items(
    chunks: list[torch.nn.Module],
    stages: list[Stage],
    prefix: str,
    stage: Callable[[torch.Tensor], torch.Tensor],
) -> list[Item]:
    """What the one rank that writes them writes; arguments as in `live.Live`."""
    found = []
    for history in histories(chunks, stages):
        kept, size = stage(history.values.detach()), tuple(history.values.shape)
        found.append(
            Item(f"{prefix}{history.key}", size, kept.dtype, (0, 0), size, partial(torch.clone, kept))
        )
    return found


@torch.no_grad()
def fill(chunks: list[torch.nn.Module], stages: list[Stage], prefix: str, stored: Stored) -> None:
    """Continue the histories that are stored; the others begin anew, with what the first step measures."""
    for chunk in chunks:
        if chunk.config.fp8 and chunk.config.fp8_recipe == "delayed":
            begin_engine(chunk.module.decoder, get_fp8_recipe(chunk.config))
    for history in histories(chunks, stages):
        key = f"{prefix}{history.key}"
        if key in stored.tensors:
            history.fill(stored.read(key).to(history.values.device))
