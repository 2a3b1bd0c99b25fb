"""Micro-batches in flight, by hand and against the order that Megatron-Core makes."""

from types import SimpleNamespace

import pytest

from megatron_vl.plan.schedule import chunk_of, peaks_in_flight


@pytest.mark.parametrize(("rank", "expected"), [(0, 4), (1, 3), (3, 1)])
def test_plain(rank, expected):
    assert peaks_in_flight(4, 1, rank, 16) == ((expected,),)
    assert peaks_in_flight(4, 1, rank, 2) == ((min(2, expected),),)


@pytest.mark.parametrize(("pp", "vpp", "count"), [(2, 2, 8), (4, 2, 8), (4, 3, 16), (3, 2, 3)])
def test_interleaved_as_megatron_core_orders_it(pp, vpp, count):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    table = get_schedule_table(count, vpp, pp)
    assert [chunk for _, chunk in table] == [chunk_of(step, pp, vpp) for step in range(count * vpp)]
    for rank in range(pp):
        group = SimpleNamespace(size=lambda: pp, rank=lambda rank=rank: rank)
        told = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=vpp)
        total, _, warmup, _ = get_pp_rank_microbatches(count, vpp, pp, p2p_communicator=told)
        held, fullest = [0] * vpp, 0
        for step in range(total):
            held[table[step][1]] += 1
            fullest = max(fullest, sum(held))
            if step >= warmup:
                held[vpp - 1 - table[step - warmup][1]] -= 1
        assert max(map(sum, peaks_in_flight(pp, vpp, rank, count))) == fullest


def test_a_longer_step_has_no_more_in_flight():
    assert peaks_in_flight(4, 2, 0, 16) == peaks_in_flight(4, 2, 0, 512)
