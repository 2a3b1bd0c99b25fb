"""Causal attention when the rows of a sequence are shared out over ranks, zigzag, dense or packed.

Both forms save a rank's own rows only: queries, keys, values, output, sums. Keys and values of the others are fetched
again in the backward pass, so that what a layer keeps does not grow with the row.

* gathered: all keys and values at once, two attention calls. Needs them for the whole row for a moment.
* ring: one rank's keys and values at a time, passed on while they are used; results are merged by their sums. Needs
  those of two ranks. Gradients of keys and values travel along and arrive home after a full turn, summed in fp32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist

from megatron_vl.ops.varlen_attention import attend, attend_backward, merge
from megatron_vl.parallel.context_parallel import global_order
from megatron_vl.parallel.sequence_exchange import Passing, gather_rows, sum_and_scatter_rows
from megatron_vl.plan.attention_calls import Call, Range, gathered_calls, ring_call, whole_call

KEYS, GRADIENTS = 0, 1  # tags of what is on its way


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[int, ...],
    scale: float,
    causal: bool,
    group: dist.ProcessGroup,
    exchange: str,
) -> torch.Tensor:
    """Softmax attention within each document, ``[t, n, d]`` and ``[t, g, d]`` twice -> ``[t, n, d]``.

    t: rows of this rank. bounds: padded document boundaries of the whole row. exchange: ``p2p`` (ring) or
    ``all_gather``.
    """
    if group.size() == 1:
        return _Alone.apply(query, key, value, whole_call(bounds, causal), scale)
    assert causal, "rows are shared out for causal attention only"
    form = {"p2p": _Ring, "all_gather": _Gathered}[exchange]
    return form.apply(query, key, value, bounds, scale, group)


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, call: Call, scale: float) -> torch.Tensor:
        out, lse = attend(q, k, v, call, scale)
        ctx.call, ctx.scale = call, scale
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *attend_backward(grad.contiguous(), *ctx.saved_tensors, ctx.call, ctx.scale), None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bounds: tuple[int, ...], scale: float, group) -> torch.Tensor:
        whole = gather_rows(torch.cat([k, v], dim=-1), group)
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=_wide(q))
        for call in gathered_calls(bounds, group.size(), group.rank()):
            queries = _rows(call.queries, q.device)
            keys, values = whole[_held(call.keys, bounds, group.size(), q.device)].split(k.shape[-1], dim=-1)
            part, sums = attend(q[queries], keys, values, call, scale)
            out[queries], lse[:, queries] = part, sums
        ctx.bounds, ctx.scale, ctx.group = bounds, scale, group
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        group, width = ctx.group, k.shape[-1]
        whole = gather_rows(torch.cat([k, v], dim=-1), group)
        dq, d_whole = torch.empty_like(q), torch.zeros_like(whole)
        for call in gathered_calls(ctx.bounds, group.size(), group.rank()):
            queries = _rows(call.queries, q.device)
            held = _held(call.keys, ctx.bounds, group.size(), q.device)
            keys, values = whole[held].split(width, dim=-1)
            dq[queries], dk, dv = attend_backward(
                grad[queries], q[queries], keys, values, out[queries], lse[:, queries], call, ctx.scale
            )
            d_whole.index_add_(0, held, torch.cat([dk, dv], dim=-1))
        dk, dv = sum_and_scatter_rows(d_whole, group).split(width, dim=-1)
        return dq, dk, dv, None, None, None


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bounds: tuple[int, ...], scale: float, group) -> torch.Tensor:
        size, rank = group.size(), group.rank()
        held = torch.stack([k, v])
        out = lse = None
        for step in range(size):
            on_the_way = Passing(held, group, KEYS) if step < size - 1 else None
            call = ring_call(bounds, size, rank, (rank - step) % size)
            queries, keys = _rows(call.queries, q.device), _rows(call.keys, q.device)
            part, sums = attend(q[queries], held[0, keys], held[1, keys], call, scale)
            if step == 0:  # its own keys: every query sees at least itself
                out, lse = part.to(_wide(q)), sums
            else:
                out[queries], lse[:, queries] = merge(out[queries], lse[:, queries], part, sums)
            held = on_the_way.received() if on_the_way else None
        out = out.to(q.dtype)
        ctx.bounds, ctx.scale, ctx.group = bounds, scale, group
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        group, size, rank = ctx.group, ctx.group.size(), ctx.group.rank()
        held = torch.stack([k, v])
        dq, d_held = torch.zeros_like(q, dtype=_wide(q)), torch.zeros_like(held, dtype=_wide(k))
        home = None
        for step in range(size):
            on_the_way = Passing(held, group, KEYS) if step < size - 1 else None
            call = ring_call(ctx.bounds, size, rank, (rank - step) % size)
            queries, keys = _rows(call.queries, q.device), _rows(call.keys, q.device)
            a, b, c = attend_backward(
                grad[queries], q[queries], held[0, keys], held[1, keys], out[queries], lse[:, queries], call,
                ctx.scale,
            )  # fmt: skip
            dq[queries] += a
            if home is not None:  # what the ranks before found for the keys held here
                d_held = home.received()
            d_held[0, keys] += b
            d_held[1, keys] += c
            home = Passing(d_held, group, GRADIENTS)
            held = on_the_way.received() if on_the_way else None
        dk, dv = home.received().to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None


def _wide(x: torch.Tensor) -> torch.dtype:
    """Format of sums over parts."""
    return torch.promote_types(x.dtype, torch.float32)


@lru_cache(maxsize=256)
def _rows(ranges: tuple[Range, ...], device: torch.device) -> slice | torch.Tensor:
    """What selects the ranges in order: a slice (no copy) when they touch, as those of a single document do."""
    if all(before[1] == after[0] for before, after in zip(ranges, ranges[1:])):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(start, end) for start, end in ranges]).to(device)


@lru_cache(maxsize=64)
def _held(ranges: tuple[Range, ...], bounds: tuple[int, ...], cp: int, device: torch.device) -> torch.Tensor:
    """Where rows of the row lie among the gathered ranks' rows."""
    return global_order(bounds, cp)[_rows(ranges, torch.device("cpu"))].to(device)
