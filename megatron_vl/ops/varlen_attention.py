"""Attention over sequences of different lengths that returns what a later merge and a backward pass need.

``attend`` gives the output and the logarithm of the sum of exponentials of every query. Partial results over parts of
the keys can be merged (``merge``), and ``attend_backward`` gives the gradient of one part from the output and the sum
over ALL parts, so that parts of the keys may come and go. Three forms of equal arguments, chosen by ``kernel_of``:

* flash: PyTorch's variable-length flash attention on CUDA in bf16 and fp16, one kernel for all sequences; also what
  an installed flash-attn 3 or 4 is called through (``use_flash_attention``). Never run: written without a GPU.
* blocks: PyTorch's flash attention for CPU, a call per run of equally long sequences.
* plain: matrix products by definition, some queries at a time; other formats on CUDA, and the others' test.

Shapes: q ``[Tq, n, d]``, k and v ``[Tk, g, d]``, n a multiple of g; out ``[Tq, n, d]``; lse fp32 ``[n, Tq]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from megatron_vl.errors import ConfigError
from megatron_vl.plan.attention_calls import Call

Tensors = tuple[torch.Tensor, ...]
PLAIN_SCORES = 1 << 24  # scores that the plain form holds at once


class Kernel(NamedTuple):
    """forward(q, k, v, call, scale) -> out, lse. backward(grad, q, k, v, out, lse, call, scale) -> dq, dk, dv."""

    name: str
    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float) -> Tensors:
    """``(out, lse)`` of the rows of ``call``, given in its order. Not differentiable by itself."""
    return kernel_of(q).forward(q, k, v, call, scale)


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    scale: float,
) -> Tensors:
    """``(dq, dk, dv)`` through these keys; out and lse: over all keys that the queries saw anywhere."""
    return kernel_of(q).backward(grad, q, k, v, out, lse, call, scale)


def kernel_of(q: torch.Tensor) -> Kernel:
    """The form for queries of this device, format and width. Flash kernels take widths of 8, 16 .. 256."""
    if q.is_cuda:
        width = q.shape[-1]
        fits = q.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256
        return FLASH if fits else PLAIN
    return BLOCKS


def use_flash_attention(name: str) -> None:
    """What PyTorch's flash operators run on CUDA: ``built_in``, or ``fa3`` / ``fa4`` of an installed flash-attn.

    Raises:
        ConfigError: it is not installed, or this PyTorch cannot use it.
    """
    if name == "built_in":
        return
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(name.upper())
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"parallel.flash_attention = {name}: PyTorch cannot use it ({error}); install flash-attn, or use "
            "parallel.flash_attention=built_in"
        ) from error


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> Tensors:
    """The result over two disjoint sets of keys; out is best kept in fp32 over many merges."""
    total = torch.logaddexp(lse, part_lse)
    weights = ((lse - total).exp(), (part_lse - total).exp())
    ours, theirs = (w.transpose(0, 1).unsqueeze(-1) for w in weights)
    return out * ours + part * theirs, total


# --- flash


@lru_cache(maxsize=64)
def _edges_on(edges: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(edges, dtype=torch.int32, device=device)


def _flash_arguments(q: torch.Tensor, call: Call) -> tuple:
    """Edges on the device (int32), longest sequences; causal is aligned at the last key (flash attention since 2.1)."""
    cu_q, cu_k = (_edges_on(edges, q.device) for edges in (call.cu_queries, call.cu_keys))
    return cu_q, cu_k, call.longest_query, call.longest_key, 0.0, call.causal


def _flash_forward(q, k, v, call: Call, scale: float) -> Tensors:
    arguments = _flash_arguments(q, call)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *arguments, False, scale=scale)
    return out, lse


def _flash_backward(grad, q, k, v, out, lse, call: Call, scale: float) -> Tensors:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), *_flash_arguments(q, call), *no_dropout, scale=scale
    )  # fmt: skip


# --- blocks


def _runs(call: Call) -> Iterator[tuple[int, slice, slice, int, int]]:
    """(sequences, their queries, their keys, length of one in both) of every run of equal lengths."""
    lengths = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(call.cu_queries), pairwise(call.cu_keys))]
    first = query = key = 0
    while first < len(lengths):
        long_q, long_k = lengths[first]
        last = first
        while last < len(lengths) and lengths[last] == lengths[first]:
            last += 1
        count = last - first
        queries, keys = count * long_q, count * long_k
        yield count, slice(query, query + queries), slice(key, key + keys), long_q, long_k
        first, query, key = last, query + queries, key + keys


def _batched(x: torch.Tensor, rows: slice, count: int) -> torch.Tensor:
    """Rows of equal sequences as ``[count, heads, length, d]``."""
    return x[rows].unflatten(0, (count, -1)).transpose(1, 2)


def _parts(call: Call, long_q: int, long_k: int) -> list[tuple[slice, bool]]:
    """Keys of a sequence and whether they are causal: those before the queries, which all see, and the diagonal."""
    assert long_k >= long_q or not call.causal, "a query without a key"
    before = long_k - long_q
    if not call.causal or before == 0:
        return [(slice(None), call.causal)]
    return [(slice(before), False), (slice(before, None), True)]


def _blocks_forward(q, k, v, call: Call, scale: float) -> Tensors:
    outs, sums = [], []
    for count, queries, keys, long_q, long_k in _runs(call):
        qs, ks, vs = _batched(q, queries, count), _batched(k, keys, count), _batched(v, keys, count)
        found = None
        for part, causal in _parts(call, long_q, long_k):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                qs, ks[:, :, part], vs[:, :, part], 0.0, causal, scale=scale
            )
            out = out.transpose(1, 2).flatten(0, 1)
            lse = lse.transpose(0, 1).flatten(1)
            found = (out, lse) if found is None else merge(*found, out, lse)
        outs.append(found[0].to(q.dtype))
        sums.append(found[1])
    if len(outs) == 1:
        return outs[0], sums[0]
    return torch.cat(outs), torch.cat(sums, dim=1)


def _blocks_backward(grad, q, k, v, out, lse, call: Call, scale: float) -> Tensors:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for count, queries, keys, long_q, long_k in _runs(call):
        qs, gs, outs = (_batched(x, queries, count) for x in (q, grad, out))
        ks, vs, to_k, to_v = (_batched(x, keys, count) for x in (k, v, dk, dv))
        sums = lse[:, queries].unflatten(1, (count, -1)).transpose(0, 1)
        total = None
        for part, causal in _parts(call, long_q, long_k):
            a, b, c = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gs, qs, ks[:, :, part], vs[:, :, part], outs, sums, 0.0, causal, scale=scale
            )
            total = a if total is None else total + a
            to_k[:, :, part], to_v[:, :, part] = b, c
        _batched(dq, queries, count).copy_(total)
    return dq, dk, dv


# --- plain


def _tiles(q, k, v, call: Call) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(queries, keys, k and v of every query head as ``[n, keys, d]`` fp32 or more, which pairs are hidden)."""
    repeats = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    for (a, b), (c, d) in zip(pairwise(call.cu_queries), pairwise(call.cu_keys)):
        keys = slice(c, d)
        ks, vs = (x[keys].to(wide).repeat_interleave(repeats, 1).transpose(0, 1) for x in (k, v))
        step = max(1, PLAIN_SCORES // (q.shape[1] * (d - c)))
        position = torch.arange(d - c, device=q.device)
        for first in range(a, b, step):
            queries = slice(first, min(first + step, b))
            sees = torch.arange(queries.start, queries.stop, device=q.device) - b + (d - c)
            hidden = position > (sees[:, None] if call.causal else d)
            yield queries, keys, ks, vs, hidden


def _plain_forward(q, k, v, call: Call, scale: float) -> Tensors:
    out = torch.empty_like(q)
    lse = torch.empty(
        q.shape[1], q.shape[0], device=q.device, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    for queries, _, ks, vs, hidden in _tiles(q, k, v, call):
        scores = q[queries].to(ks.dtype).transpose(0, 1) @ ks.transpose(1, 2) * scale
        scores.masked_fill_(hidden, float("-inf"))
        lse[:, queries] = scores.logsumexp(-1)
        out[queries] = ((scores - lse[:, queries, None]).exp() @ vs).transpose(0, 1).to(q.dtype)
    return out, lse


def _plain_backward(grad, q, k, v, out, lse, call: Call, scale: float) -> Tensors:
    groups, wide = k.shape[1], lse.dtype
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    for queries, keys, ks, vs, hidden in _tiles(q, k, v, call):
        qs, gs, outs = (x[queries].to(wide).transpose(0, 1) for x in (q, grad, out))
        share = (qs @ ks.transpose(1, 2) * scale - lse[:, queries, None]).exp().masked_fill_(hidden, 0.0)
        slope = share * (gs @ vs.transpose(1, 2) - (gs * outs).sum(-1, keepdim=True)) * scale
        dq[queries] = (slope @ ks).transpose(0, 1)
        for total, x in ((dk, slope.transpose(1, 2) @ qs), (dv, share.transpose(1, 2) @ gs)):
            total[keys] += x.unflatten(0, (groups, -1)).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


FLASH = Kernel("flash", _flash_forward, _flash_backward)
BLOCKS = Kernel("blocks", _blocks_forward, _blocks_backward)
PLAIN = Kernel("plain", _plain_forward, _plain_backward)
