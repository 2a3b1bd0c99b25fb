"""The work is really shared: FLOPs of each rank against the planned share, views per rank."""

from collections import Counter

import pytest

from megatron_vl.parity.layouts import ALL
from megatron_vl.parity.reference import Batches
from megatron_vl.plan.cost import train_flops, view_costs
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.stages import plan_stages
from tests.fixtures.shares import flops_by_rank
from tests.fixtures.small import WIDE, make_documents
from tests.model.counting import Counted, count_on_rank
from tests.model.on_ranks import run_of

# Two packed rows for two data-parallel ranks or micro-batches; 3 globals and 5 crops in the first.
DOCS = make_documents(
    WIDE, [([(1, 3), (0, 0)], 90), ([(1, 2)], 70), ([(2, 2), (0, 0)], 60), ([], 120)]
)  # fmt: skip


def planned(layout: Layout, batches: Batches) -> list[tuple[float, float]]:
    """(forward, training) FLOPs that the plan gives to each rank over its micro-batches."""
    stages = plan_stages(WIDE.text.num_layers, layout.pp, layout.vpp)
    shares = []
    for rank in range(layout.world_size):
        coords = layout.coords(rank)
        sums = [0.0, 0.0]
        for rows in batches.rows[coords.dp]:
            kinds = [kind for doc in rows[0] for kind in doc.kinds]
            lengths = [len(doc.ids) for doc in rows[0]]
            plan = flops_by_rank(WIDE, layout, stages, kinds, lengths, tokens=batches.seq_length)
            (share,) = [s for c, s in plan.items() if (c.tp, c.cp, c.pp) == (coords.tp, coords.cp, coords.pp)]
            sums[0] += sum(share.values())
            sums[1] += sum(train_flops(WIDE, share).values())
        shares.append(tuple(sums))
    return shares


QUICK = [(layout, "data") for layout in ("1", "tp2", "tp4sp", "pp2vpp2", "cp4", "tp2pp2cp2sp", "dp2cp2tp2sp")]
QUICK += [("tp2spcp2", "tensor"), ("dp2tp2pp2", "tensor")]
CASES = [
    pytest.param(layout, placement, marks=[] if (layout, placement) in QUICK else [pytest.mark.slow])
    for placement in ("data", "tensor")
    for layout in ALL
]


@pytest.mark.parametrize(("layout", "placement"), CASES)
def test_no_rank_does_more_than_its_share(world, layout, placement):
    config, batches, place = run_of(WIDE, layout, placement, DOCS, packed=True)
    counted: list[Counted] = world.run(place.world_size, count_on_rank, config, batches)
    for rank, (found, (forward, step)) in enumerate(zip(counted, planned(place, batches), strict=True)):
        assert 0.9 < found.forward / forward < 1.2, f"forward of {place.describe(rank)}"
        assert 0.85 < found.step / step < 1.2, f"step of {place.describe(rank)}"
    check_views(place, batches, counted)


def check_views(place: Layout, batches: Batches, counted: list[Counted]) -> None:
    """No rank has more than the mean and one view's cost, and globals differ by at most 1; each is encoded once."""
    costs = view_costs(WIDE)
    for dp in range(place.dp):
        ranks = [r for r in range(place.world_size) if (place.coords(r).dp, place.coords(r).pp) == (dp, 0)]
        if place.placement == "tensor":
            ranks = [r for r in ranks if place.coords(r).tp == 0]
        for number, rows in enumerate(batches.rows[dp]):
            kinds = Counter(kind for doc in rows[0] for kind in doc.kinds)
            views = [counted[r].views[number] for r in ranks]
            loads = [crops * costs[0] + wholes * costs[1] for crops, wholes in views]
            assert max(loads) <= sum(loads) / len(loads) + max(costs)
            assert max(wholes for _, wholes in views) - min(wholes for _, wholes in views) <= 1
            assert [sum(numbers) for numbers in zip(*views)] == [kinds[0], kinds[1]]
