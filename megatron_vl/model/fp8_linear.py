"""Megatron-Core's parallel linears with products in FP8: the torch backend's, for GPUs without Transformer Engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_vl.ops.fp8_product import E4M3, E5M2, GRADIENT, Split, fp8_linear, largest, scale_of
from megatron_vl.parallel.groups import Groups
from megatron_vl.plan.fp8 import Fp8Recipe


class AmaxScaling(torch.nn.Module):
    """Scales of a layer's input, weight and gradient, by their largest absolute values.

    Delayed: ``history`` fp32 ``[steps, 3]`` holds those of earlier steps, newest first, 0 = none; ``seen`` ``[3]``
    those of this one. As long as there is no history, and for tensorwise scaling, the tensor itself is measured.
    """

    def __init__(self, recipe: Fp8Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        if recipe.delayed:
            self.register_buffer("history", torch.zeros(recipe.history, 3), persistent=False)
            self.register_buffer("seen", torch.zeros(3), persistent=False)
        self.begun = [False] * 3  # has a history; the same on every rank, since it decides who communicates

    def dtype(self, which: int) -> torch.dtype:
        return E5M2 if which == GRADIENT and self.recipe.format == "hybrid" else E4M3

    def scales(
        self, which: list[int], tensors: list[torch.Tensor], group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        amax = torch.stack([largest(tensor) for tensor in tensors])
        if self.recipe.delayed and self.training:
            for number, value in zip(which, amax):
                torch.maximum(self.seen[number], value, out=self.seen[number])
        begun = [self.begun[number] for number in which]
        if group is not None and not all(begun):
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        if any(begun):
            earlier = self.history[0] if self.recipe.compute == "most_recent" else self.history.amax(dim=0)
            amax = torch.stack([earlier[n] if b else a for n, b, a in zip(which, begun, amax)])
        return torch.stack([scale_of(a, self.dtype(n), self.recipe.margin) for n, a in zip(which, amax)])

    def fill(self, history: torch.Tensor) -> None:
        """Continue from the history of a checkpoint, ``[n, 3]``, whatever its length."""
        count = min(len(history), len(self.history))
        self.history.zero_()
        self.history[:count] = history[:count]
        self.begun = (self.history[0] > 0).tolist()


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel, with or without sequence parallelism."""

    def __init__(self, *args, recipe: Fp8Recipe, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scaling = AmaxScaling(recipe)

    def _forward_impl(
        self, input, weight, bias, allreduce_dgrad, sequence_parallel, **unused
    ) -> torch.Tensor:
        del unused
        split = Split(self.tp_group, column=True, gather=sequence_parallel, sum_gradient=allreduce_dgrad)
        out = fp8_linear(input, weight, self.scaling, split)
        return out if bias is None else out + bias


class Fp8RowParallelLinear(RowParallelLinear):
    """Row-parallel: Megatron-Core sums what the ranks return, in the format of the activations."""

    def __init__(self, *args, recipe: Fp8Recipe, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scaling = AmaxScaling(recipe)

    def _forward_impl(self, input, weight, **unused) -> torch.Tensor:
        del unused
        return fp8_linear(input, weight, self.scaling, Split(self.tp_group, column=False))


def delayed_scalings(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[int, str, AmaxScaling]]:
    """(chunk, name of the linear, its scaling) of every layer that keeps a history, in a fixed order."""
    for number, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            if isinstance(module, AmaxScaling) and module.recipe.delayed:
                yield number, name.removesuffix(".scaling"), module


@torch.no_grad()
def end_step(chunks: Sequence[torch.nn.Module], groups: Groups, skipped: bool) -> None:
    """Put what this step has seen on top of the histories, the largest over all ranks that share the weights.

    skipped: forget it instead. A tensor that no rank had (a tower's, without images) keeps its history.
    """
    scalings = [scaling for _, _, scaling in delayed_scalings(chunks)]
    if not scalings:
        return
    seen = torch.stack([scaling.seen for scaling in scalings])
    if not skipped:
        for group in (groups.dp_cp, groups.tp):
            dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    for scaling, values in zip(scalings, seen):
        scaling.seen.zero_()
        if not skipped:
            rolled = scaling.history.roll(1, dims=0)
            rolled[0] = values
            new = (values > 0) & values.isfinite()
            scaling.history.copy_(torch.where(new, rolled, scaling.history))
    newest = torch.stack([scaling.history[0] for scaling in scalings]) > 0
    for scaling, begun in zip(scalings, newest.tolist()):
        scaling.begun = begun
