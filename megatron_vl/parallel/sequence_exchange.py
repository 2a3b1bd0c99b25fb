"""How rows of keys and values, and their gradients, travel over the context-parallel group."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's rows, one rank behind the other: ``[t, ...] -> [size * t, ...]``."""
    out = torch.empty((group.size() * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def sum_and_scatter_rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The inverse for gradients: this rank's rows, summed over the group. ``[size * t, ...] -> [t, ...]``."""
    out = torch.empty((x.shape[0] // group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


class Passing:
    """A tensor on its way to the next rank of the ring, while the same shape comes from the one before."""

    def __init__(self, x: torch.Tensor, group: dist.ProcessGroup, tag: int = 0) -> None:
        """x: contiguous, not to be changed before ``received``. tag: apart from what else is on the way."""
        size, rank = group.size(), group.rank()
        self.sent, self.came = x, torch.empty_like(x)
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=group, tag=tag, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, self.came, group=group, tag=tag, group_peer=(rank - 1) % size),
            ]
        )

    def received(self) -> torch.Tensor:
        """What came; afterwards the sent tensor is free."""
        for work in self.works:
            work.wait()
        self.sent = None
        return self.came
