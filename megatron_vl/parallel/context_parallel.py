"""Context parallelism on the sequence dimension: which tokens a rank holds, and the exchange of K and V.

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


class _GatherSequence(torch.autograd.Function):
    """All-gather along dimension 0; the gradient is summed over the group and scattered back.

    ``torch.distributed.nn.functional.all_gather`` is not used: its backward looks up global ranks and fails
    in a subgroup (design/megatron_core.md section 4).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty((group.size() * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        size = ctx.group.size()
        out = torch.empty((grad.shape[0] // size, *grad.shape[1:]), dtype=grad.dtype, device=grad.device)
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


def gather_sequence(x: torch.Tensor, cu_seqlens: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's tokens in row order: ``[S / cp, ...] -> [S, ...]``, differentiable."""
    index = global_order(cu_seqlens, group.size(), x.device)
    return _GatherSequence.apply(x, group).index_select(0, index)
