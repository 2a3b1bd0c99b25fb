"""What the ranks do for the tests of FP8."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from megatron_vl.checkpoint.hf_names import global_name
from megatron_vl.config.schema import RunConfig
from megatron_vl.model.fp8_linear import (
    AmaxScaling,
    Fp8ColumnParallelLinear,
    Fp8RowParallelLinear,
    delayed_scalings,
)
from megatron_vl.parity.on_rank import Seen
from megatron_vl.parity.reference import Batches, micro_batches
from megatron_vl.train.step import train_step
from tests.model.on_ranks import build_parts, gradients_on_rank


def gradients_with_own_scales(config: RunConfig, batches: Batches) -> Seen:
    """A planted fault: every tensor-parallel rank scales its part by itself."""
    plain = AmaxScaling.scales

    def alone(self, which, tensors, group):
        return plain(self, which, tensors, None)

    with patch.object(AmaxScaling, "scales", alone):
        return gradients_on_rank(config, batches)


def quantised_names(config: RunConfig) -> list[str]:
    """Global names of the linears of this rank that are in FP8."""
    parts = build_parts(config)
    return [
        global_name(name, stage.layers)
        for chunk, stage in zip(parts.chunks, parts.stages)
        for name, module in chunk.module.named_modules()
        if isinstance(module, (Fp8ColumnParallelLinear, Fp8RowParallelLinear))
    ]


def delayed_on_rank(config: RunConfig, batches: Batches, steps: int) -> dict[str, Any]:
    """Losses of some steps, and the histories of this rank by global name of the linear."""
    parts = build_parts(config, with_optimizer=True)
    feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
    losses = [train_step(parts, feed, 1e-3).loss for _ in range(steps)]
    found: dict[str, torch.Tensor] = {}
    for number, name, scaling in delayed_scalings(parts.chunks):
        found[global_name(name, parts.stages[number].layers)] = scaling.history.clone()
    return {"losses": losses, "histories": found}
