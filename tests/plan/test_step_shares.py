"""Sharing the views of a step out over all ranks of a replica: every view once, and no rank far above the mean."""

import random

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.stages import plan_stages, to_megatron_layout, tower_of_rank
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_step, share_views

COSTS = view_costs(ModelConfig())
STEP = [[CROP] * 5 + [GLOBAL], [], [GLOBAL], [CROP, GLOBAL] * 3]


@pytest.mark.parametrize("size", [1, 2, 4, 7, 16])
def test_every_view_of_the_step_once_and_within_one_view_of_the_mean(size):
    shares = share_step(STEP, size, COSTS, together=True)
    for kinds, of_ranks in zip(STEP, shares, strict=True):
        assert sorted(view for mine in of_ranks for view in mine) == list(range(len(kinds)))
        for mine in of_ranks:  # crops first, both ascending: the order of pixels and features
            assert mine == sorted(mine, key=lambda view: (kinds[view] != CROP, view))
    loads = [
        sum(COSTS[kinds[view]] for kinds, of_ranks in zip(STEP, shares) for view in of_ranks[rank])
        for rank in range(size)
    ]
    assert max(loads) <= sum(loads) / size + max(COSTS)


def test_micro_batches_apart_are_shared_out_one_by_one():
    assert share_step(STEP, 4, COSTS, together=False) == [share_views(kinds, 4, COSTS) for kinds in STEP]
    one = share_step(STEP[:1], 4, COSTS, together=True)
    assert one == [share_views(STEP[0], 4, COSTS)]


def test_a_step_is_balanced_where_its_micro_batches_are_not():
    """Rows of one image on 16 ranks: most ranks have nothing of a row, all have the same of 64 rows."""
    draw = random.Random(3)
    step = [[CROP] * draw.randrange(9) + [GLOBAL] for _ in range(64)]

    def balance(together: bool) -> float:
        shares = share_step(step, 16, COSTS, together)
        loads = [
            [sum(COSTS[kinds[view]] for view in mine[rank]) for kinds, mine in zip(step, shares)]
            for rank in range(16)
        ]
        total = sum(map(sum, loads)) / 16
        if together:  # the ranks wait for each other once a step
            return max(map(sum, loads)) / total
        return sum(max(of_batch) for of_batch in zip(*loads)) / total

    assert balance(True) < 1.05 < 2 < balance(False)


def test_vision_ranks_number_the_whole_replica():
    layout = Layout(tp=2, cp=3, dp=2, pp=2, placement="all")
    assert layout.vision_size == 12 and layout.tower_beside
    for dp in range(2):
        replica = [rank for rank in range(layout.world_size) if layout.coords(rank).dp == dp]
        assert [layout.vision_rank(layout.coords(rank)) for rank in replica] == list(range(12))
    assert all(layout.encodes(Coords(0, 0, 0, pp)) for pp in range(2))
    data = Layout(tp=2, cp=3, dp=2, pp=2)
    assert [data.encodes(Coords(0, 0, 0, pp)) for pp in range(2)] == [True, False]


def test_no_stage_has_the_tower_that_stands_beside():
    stages = plan_stages(4, 2, 2, tower_beside=True)
    assert not any(stage.has_vision for of_rank in stages for stage in of_rank)
    assert to_megatron_layout(stages) == to_megatron_layout(plan_stages(4, 2, 2))
    assert (
        tower_of_rank(1).has_vision
        and not tower_of_rank(1).has_embedding
        and str(tower_of_rank(1)) == "tower"
    )
