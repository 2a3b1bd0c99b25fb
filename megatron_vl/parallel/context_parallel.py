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
