"""Context parallelism on the sequence dimension: which tokens a rank holds.

Each document is cut into ``2 * cp`` equal chunks and rank ``r`` holds chunks ``r`` and ``2 * cp - 1 - r``
("zigzag"), so that causal attention costs every rank the same.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist

from megatron_vl.plan.sequence import zigzag

CPU = torch.device("cpu")


@lru_cache(maxsize=64)
def local_index(
    cu_seqlens: tuple[int, ...], cp_size: int, cp_rank: int, device: torch.device = CPU
) -> torch.Tensor:
    """Positions (int64 ``[S / cp]``) of the row that ``cp_rank`` holds, in its local order."""
    return torch.tensor(zigzag(cu_seqlens, cp_size)[cp_rank], dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def global_order(cu_seqlens: tuple[int, ...], cp_size: int, device: torch.device = CPU) -> torch.Tensor:
    """Index (int64 ``[S]``) that puts the ranks' concatenated tokens back into row order."""
    held = torch.tensor([i for rank in zigzag(cu_seqlens, cp_size) for i in rank], dtype=torch.int64)
    return torch.argsort(held).to(device)


def held_positions(
    rows: torch.Tensor, bounds: list[int] | None, group: dist.ProcessGroup
) -> torch.Tensor | None:
    """Positions of whole rows ``[b, S]`` that this context-parallel rank holds; None = all. bounds None = dense."""
    if group.size() == 1:
        return None
    return local_index(tuple(bounds or (0, rows.shape[1])), group.size(), group.rank(), rows.device)


def take_local(rows: torch.Tensor, bounds: list[int] | None, group: dist.ProcessGroup) -> torch.Tensor:
    """What this context-parallel rank holds of whole rows: ``[b, S] -> [b, S / cp]``."""
    index = held_positions(rows, bounds, group)
    return rows if index is None else rows[:, index]


class _GatherFeatures(torch.autograd.Function):
    """Gather rows of unequal counts over ``group``; each rank gets back the gradient of its own rows.

    The gradient of a feature row is wanted by the context-parallel ranks that hold its position, so it is
    summed over ``cp_group``. Tensor-parallel ranks hold equal copies of it: it is not summed over them.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, counts: list[int], group, cp_group) -> torch.Tensor:
        ctx.counts, ctx.group, ctx.cp_group = counts, group, cp_group
        longest = max(counts)
        mine = rows.new_zeros((longest, rows.shape[1]))
        mine[: rows.shape[0]] = rows
        out = torch.empty((len(counts) * longest, rows.shape[1]), dtype=rows.dtype, device=rows.device)
        dist.all_gather_into_tensor(out, mine, group=group)
        return torch.cat([out[r * longest : r * longest + n] for r, n in enumerate(counts)])

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        if ctx.cp_group.size() > 1:
            grad = grad.contiguous()
            dist.all_reduce(grad, group=ctx.cp_group)
        start = sum(ctx.counts[: ctx.group.rank()])
        return grad[start : start + ctx.counts[ctx.group.rank()]], None, None, None


def gather_features(rows: torch.Tensor, counts: list[int], group, cp_group) -> torch.Tensor:
    """``[counts[rank], h] -> [sum(counts), h]`` in rank order, differentiable.

    rows: this rank's feature rows. counts: rows of every rank of ``group`` (known from the plan, so that no
    sizes are exchanged). cp_group: the ranks among which the positions are split.
    """
    assert rows.shape[0] == counts[group.rank()], "the local feature rows do not match the plan"
    if group.size() == 1:
        return rows
    return _GatherFeatures.apply(rows, counts, group, cp_group)
