"""Variable-length flash attention on one GPU against the plain form, whole and in the parts of a ring."""

from __future__ import annotations

import pytest
import torch

from megatron_vl.ops.varlen_attention import FLASH, PLAIN, kernel_of, merge
from megatron_vl.parity.compare import relative
from megatron_vl.plan.attention_calls import Call, gathered_calls, ring_call, whole_call
from megatron_vl.plan.sequence import zigzag

pytestmark = pytest.mark.gpu
BOUNDS = (0, 2048, 2112, 6144, 8192)
SCALE, HEADS, GROUPS = 0.09, 8, 2


def tensors(rows: int, width: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, bf16."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(rows, n, width) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]


def plain(q, k, v, grad, call: Call):
    wide = [x.float() for x in (q, k, v, grad)]
    out, lse = PLAIN.forward(*wide[:3], call, SCALE)
    return out, lse, *PLAIN.backward(wide[3], *wide[:3], out, lse, call, SCALE)


def assert_near(found, expected) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours.float().cpu(), theirs.float().cpu()) < 2e-2


@pytest.mark.parametrize("width", [96, 128])
def test_a_packed_row_is_one_call(width):
    call = whole_call(BOUNDS, causal=True)
    q, k, v, grad = tensors(BOUNDS[-1], width)
    assert kernel_of(q) is FLASH
    out, lse = FLASH.forward(q, k, v, call, SCALE)
    assert lse.shape == (HEADS, BOUNDS[-1]) and lse.dtype == torch.float32
    gradients = FLASH.backward(grad, q, k, v, out, lse, call, SCALE)
    assert_near((out, lse, *gradients), plain(q, k, v, grad, call))


@pytest.mark.parametrize("form", ["ring", "gathered"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_calls_of_a_context_parallel_rank(form, rank):
    """Parts of the keys of a zigzag rank, merged; causal calls have more keys than queries (gathered)."""
    cp = 4
    q, k, v, grad = tensors(BOUNDS[-1], 128)
    expected = plain(q, k, v, grad, whole_call(BOUNDS, causal=True))
    held = [torch.tensor(rows, device="cuda") for rows in zigzag(BOUNDS, cp)]
    mine = held[rank]
    out = torch.zeros(len(mine), HEADS, 128, device="cuda")
    lse = torch.full((HEADS, len(mine)), -torch.inf, device="cuda")
    calls = [(call, None) for call in gathered_calls(BOUNDS, cp, rank)]
    if form == "ring":
        calls = [(ring_call(BOUNDS, cp, rank, source), source) for source in range(cp)]
    pieces = []
    for call, source in calls:
        rows = torch.cat([torch.arange(a, b, device="cuda") for a, b in call.queries])
        keys = torch.cat([torch.arange(a, b, device="cuda") for a, b in call.keys])
        keys = keys if source is None else held[source][keys]
        part, sums = FLASH.forward(q[mine][rows], k[keys], v[keys], call, SCALE)
        out[rows], lse[:, rows] = merge(out[rows], lse[:, rows], part, sums)
        pieces.append((call, rows, keys))
    dq = torch.zeros_like(out)
    for call, rows, keys in pieces:
        given = (
            grad[mine][rows],
            q[mine][rows],
            k[keys],
            v[keys],
            out.bfloat16()[rows],
            lse[:, rows].contiguous(),
        )
        dq[rows] += FLASH.backward(*given, call, SCALE)[0]
    assert_near((out, lse, dq), (expected[0][mine], expected[1][:, mine], expected[2][mine]))


def test_memory_does_not_grow_with_the_square_of_a_document():
    peaks = []
    for length in (16384, 65536):
        call = whole_call((0, length), causal=True)
        q, k, v, _ = tensors(length, 128)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        FLASH.forward(q, k, v, call, SCALE)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del q, k, v
    assert peaks[1] < 6 * peaks[0]
