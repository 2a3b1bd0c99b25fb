"""Fresh weights on the ranks."""

from __future__ import annotations

from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.config.schema import RunConfig
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parity.reference import Batches, micro_batches
from megatron_vl.train.build import build
from megatron_vl.train.step import evaluate_loss


def fresh_loss(config: RunConfig, batches: Batches, seed: int) -> tuple[float, int]:
    """(loss, tokens) of a model that was just drawn."""
    runtime = start(config.parallel, 1, choose_device("cpu"))
    parts = build(config, runtime, FreshWeights(config.model, seed), with_optimizer=False)
    return evaluate_loss(parts, micro_batches(batches, config.model, runtime.layout, runtime.rank))
