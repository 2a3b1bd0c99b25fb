"""The rank grid, against Megatron-Core's own order and against hand-made examples."""

import pytest

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.plan.layout import Coords, Layout


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, cp=3, dp=2, pp=4), Layout(cp=2, dp=5)])
def test_rank_and_coords_are_inverse(layout):
    seen = [layout.coords(rank) for rank in range(layout.world_size)]
    assert [layout.rank(coords) for coords in seen] == list(range(layout.world_size))
    assert len(set(seen)) == layout.world_size


def test_tensor_is_fastest_and_pipeline_slowest():
    layout = Layout(tp=2, cp=2, dp=2, pp=2)
    steps = {rank: layout.coords(rank) for rank in (1, 2, 4, 8)}
    assert steps == {
        1: Coords(1, 0, 0, 0),
        2: Coords(0, 1, 0, 0),
        4: Coords(0, 0, 1, 0),
        8: Coords(0, 0, 0, 1),
    }


@pytest.mark.slow  # imports Megatron-Core
def test_the_order_is_that_of_megatron_core():
    rank_generator = pytest.importorskip("megatron.core.parallel_state").RankGenerator
    layout = Layout(tp=2, cp=3, dp=2, pp=2)
    generator = rank_generator(tp=2, ep=1, dp=2, pp=2, cp=3, order="tp-cp-ep-dp-pp")
    for axis in ("tp", "cp", "dp", "pp"):
        ours = {}
        for rank in range(layout.world_size):
            coords = layout.coords(rank)
            others = tuple(getattr(coords, name) for name in ("tp", "cp", "dp", "pp") if name != axis)
            ours.setdefault(others, []).append(rank)
        assert sorted(ours.values()) == sorted(map(list, generator.get_ranks(axis)))


def test_describe():
    assert Layout(tp=2, pp=2, dp=1).describe(3) == "rank 3 (dp0 pp1 cp0 tp1)"
    with pytest.raises(ValueError, match="ranks 0 to 3"):
        Layout(tp=2, pp=2).describe(4)


def test_grid():
    assert Layout(tp=2, cp=2, dp=1, pp=2).grid() == ["dp0 pp0  [0 1] [2 3]", "dp0 pp1  [4 5] [6 7]"]
    assert str(Layout(tp=2, pp=2, vpp=2, sp=True)) == "TP2 CP1 DP1 PP2 VPP2 SP, vision placement data"


@pytest.mark.parametrize(("placement", "size"), [("data", 6), ("tensor", 3)])
def test_vision_ranks_of_the_first_stage(placement, size):
    layout = Layout(tp=2, cp=3, dp=2, pp=2, placement=placement)
    assert layout.vision_size == size
    ranks = [layout.vision_rank(Coords(tp, cp, 1, 0)) for cp in range(3) for tp in range(2)]
    assert ranks == ([0, 1, 2, 3, 4, 5] if placement == "data" else [0, 0, 1, 1, 2, 2])


def test_from_config():
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=3,
        sequence_parallel=True,
        vision_placement="tensor",
    )
    assert Layout.from_config(parallel, 24) == Layout(2, 2, 3, 2, 3, True, "tensor")
    assert Layout.from_config(parallel, 24).num_chunks == 6
