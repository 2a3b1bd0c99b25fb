"""The attention calls of a rank: together exactly the causal pairs of every document, the same number on each rank."""

import pytest

from megatron_vl.plan.attention_calls import Call, gathered_calls, ring_call, whole_call
from megatron_vl.plan.sequence import zigzag

BOUNDS = (0, 16, 16, 48, 64)


def seen(call: Call, query_rows: list[int], key_rows: list[int]) -> list[tuple[int, int]]:
    """(query, key) positions of the row that a call computes; rows of the call -> positions of the row."""
    found = []
    for (a, b), (c, d) in zip(call.queries, call.keys):
        for i in range(a, b):
            last = d - (b - 1 - i) if call.causal else d
            found += [(query_rows[i], key_rows[j]) for j in range(c, last)]
    return found


def wanted(bounds) -> list[tuple[int, int]]:
    return [(i, j) for a, b in zip(bounds, bounds[1:]) for i in range(a, b) for j in range(a, i + 1)]


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("form", ["gathered", "ring"])
def test_every_causal_pair_once(cp, form):
    held, row, found = zigzag(BOUNDS, cp), list(range(BOUNDS[-1])), []
    for rank in range(cp):
        if form == "gathered":
            mine = [pair for call in gathered_calls(BOUNDS, cp, rank) for pair in seen(call, held[rank], row)]
        else:
            calls = [ring_call(BOUNDS, cp, rank, source) for source in range(cp)]
            mine = [pair for s, call in enumerate(calls) for pair in seen(call, held[rank], held[s])]
        found += mine
    assert sorted(found) == sorted(wanted(BOUNDS)) and len(set(found)) == len(found)


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_ranks_have_the_same_work_at_every_step_of_the_ring(cp):
    bounds = (0, 64, 128)
    for step in range(cp):
        work = {ring_call(bounds, cp, rank, (rank - step) % cp).pairs for rank in range(cp)}
        assert len(work) == 1
    assert len({sum(c.pairs for c in gathered_calls(bounds, cp, rank)) for rank in range(cp)}) == 1


def test_edges_of_calls_written_out():
    call = whole_call((0, 6, 6, 10), causal=True)
    assert call == Call(((0, 6), (6, 10)), ((0, 6), (6, 10)), True)
    assert (call.cu_queries, call.longest_query, call.pairs) == ((0, 6, 10), 6, 21 + 10)
    assert whole_call((0, 6), causal=False).pairs == 36
    early, late = gathered_calls((0, 8, 12), 2, 0)  # chunks 0 and 3 of a document of 8, then of one of 4
    assert (early.queries, early.keys) == (((0, 2), (4, 5)), ((0, 2), (8, 9)))
    assert (late.queries, late.keys) == (((2, 4), (5, 6)), ((0, 8), (8, 12)))
    assert (late.cu_queries, late.cu_keys, late.longest_key) == ((0, 2, 3), (0, 8, 12), 8)
    assert ring_call((0, 8, 12), 2, 1, 0) == Call(((0, 4), (4, 6)), ((0, 2), (4, 5)), False)
    assert ring_call((0, 8, 12), 2, 0, 1) == Call(((2, 4), (5, 6)), ((0, 4), (4, 6)), False)
    assert ring_call((0, 8), 2, 1, 1) == Call(((0, 4),), ((0, 4),), True)
