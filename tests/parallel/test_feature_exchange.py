"""The live exchange of features: rows arrive where they are owned, gradients where they were made, once."""

import pytest

from megatron_vl.plan.layout import Layout
from megatron_vl.plan.vision_share import CROP, GLOBAL
from tests.parallel.on_ranks import feature_exchange

MANY = [CROP, CROP, CROP, GLOBAL, CROP, GLOBAL, GLOBAL]
LAYOUTS = [
    Layout(tp=tp, cp=cp, sp=sp, placement=placement)
    for tp, cp, sp in ((1, 1, False), (2, 1, True), (1, 4, False), (2, 2, False), (2, 2, True))
    for placement in (("data", "tensor") if tp > 1 else ("data",))
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_and_gradients_arrive(world, layout):
    for answer, *_ in world.run(layout.world_size, feature_exchange, layout, MANY, [0, 24, 64], 11):
        assert answer == {"forward": True, "graph": True, "backward": True}


def test_ranks_without_views_or_without_positions_take_part(world):
    """One crop on four ranks, inside the slice of one: the others neither send nor receive."""
    layout = Layout(tp=2, cp=2, sp=True)
    answers = world.run(4, feature_exchange, layout, [CROP], [0, 64], 2)
    assert all(all(held.values()) for held, _, _ in answers)
    assert [rows for _, rows, _ in answers] == [2, 0, 0, 0]
    assert [rows for *_, rows in answers] == [2, 0, 0, 0]
    everything_elsewhere = world.run(4, feature_exchange, layout, [CROP], [0, 64], 60)
    assert all(all(held.values()) for held, _, _ in everything_elsewhere)
    assert [rows for *_, rows in everything_elsewhere] == [0, 2, 0, 0]


def test_without_gradient_nothing_is_kept(world):
    for answer, *_ in world.run(4, feature_exchange, Layout(tp=2, cp=2), MANY, [0, 64], 8, False):
        assert answer == {"forward": True, "graph": True}  # as asked for: none
