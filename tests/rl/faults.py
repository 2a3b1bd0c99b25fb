"""Faults that tests of rl/ plant on the ranks; each is undone when its job ends."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch


def mean_per_micro_batch():
    """The policy's loss is averaged within its micro-batch."""
    from megatron_vl.rl import update

    plain = update._policy_loss

    def mean(local, ppo, scores):
        loss, count, report = plain(local, ppo, scores)
        return loss / count.clamp(min=1), count, report

    return patch.object(update, "_policy_loss", mean)


def value_mean_per_micro_batch():
    """The critic's loss is averaged within its micro-batch (NeMo-RL 2687)."""
    from megatron_vl.rl import update

    plain = update._value_loss

    def mean(local, clip, output):
        loss, count, report = plain(local, clip, output)
        return loss / count.clamp(min=1), count, report

    return patch.object(update, "_value_loss", mean)


def arrays_are_not_cut():
    """Context parallelism: numbers per token are cut into consecutive blocks, tokens in zigzag order."""
    from megatron_vl.rl import update

    plain = update.take_local

    def block(rows, bounds, group):
        if rows.dtype != torch.float32:
            return plain(rows, bounds, group)
        return rows.chunk(group.size(), dim=1)[group.rank()]

    return patch.object(update, "take_local", block)


def scores_are_not_reordered():
    """What context-parallel ranks hold is joined in the order of ranks (verl 4250)."""
    from megatron_vl.rl import update

    return patch.object(
        update, "global_order", lambda bounds, size, device: torch.arange(bounds[-1], device=device)
    )


def masked_tokens_count():
    """Prompt and padding are divided by as well."""
    from megatron_vl.rl.update import LocalTokens

    everything = property(lambda self: torch.tensor(self.mask.numel(), dtype=torch.int))
    return patch.object(LocalTokens, "count", everything)


def head_is_not_summed():
    """Sequence parallelism: each tensor-parallel rank keeps the head's gradient of its own tokens."""
    from megatron_vl.model.heads import ValueHead

    plain = ValueHead.__init__

    def unmarked(self, config, tp):
        plain(self, config, tp)
        self.weight.sequence_parallel = False

    return patch.object(ValueHead, "__init__", unmarked)


def normalised_per_rank():
    """Advantages are whitened with the sums of one data-parallel rank."""
    from megatron_vl.rl import learn

    alone = SimpleNamespace(
        all_reduce=lambda values, group: None, all_gather_object=learn.dist.all_gather_object
    )
    return patch.object(learn, "dist", alone)


FAULTS = {
    f.__name__: f
    for f in (
        mean_per_micro_batch, value_mean_per_micro_batch, arrays_are_not_cut, scores_are_not_reordered,
        masked_tokens_count, head_is_not_summed, normalised_per_rank,
    )
}  # fmt: skip


def with_fault(fault: str, function: Callable[..., Any], *args: Any) -> Any:
    """On a rank: call ``function`` with the fault in place."""
    with FAULTS[fault]():
        return function(*args)


class FaultyWorld:
    """A world whose ranks run every function with a fault in place."""

    def __init__(self, world: Any, fault: str) -> None:
        self.world, self.fault = world, fault

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        return self.world.run(size, with_fault, self.fault, function, *args)
