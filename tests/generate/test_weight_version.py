"""The version of weights: the same in every layout, another one after any change."""

import pytest
import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.generate.noise import MASK
from megatron_vl.generate.weight_version import rectangle_sum
from megatron_vl.parity.layouts import parse_layout
from tests.fixtures.small import SMALL
from tests.generate.on_ranks import version_on_rank


def version(world, layout: str, placement: str = "data", change: float = 1e-6) -> tuple[str, str]:
    named = parse_layout(layout, placement, "cpu")
    config = RunConfig(model=SMALL, parallel=named.parallel)
    answers = world.run(named.world_size, version_on_rank, config, change)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


@pytest.mark.parametrize(
    ("layout", "placement"),
    [
        ("tp2pp2sp", "tensor"),
        ("dp2tp4", "data"),
        ("pp2", "all"),
        pytest.param("tp2", "data", marks=pytest.mark.slow),
        pytest.param("dp2cp2", "data", marks=pytest.mark.slow),
        pytest.param("pp2vpp2", "data", marks=pytest.mark.slow),
    ],
)
def test_layouts_agree_and_updates_change_it(world, layout, placement):
    before, after = version(world, "1")
    assert len(before) == 16 and before != after
    found = version(world, layout, placement)
    assert found[0] == before
    # the test changes one value of each shard: without tensor parallelism the same one
    assert found[1] != before and (found[1] == after) == ("tp" not in layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_may_be_cut_anywhere(dtype):
    whole = torch.randn(37, 23, generator=torch.Generator().manual_seed(1)).to(dtype)
    total = rectangle_sum("a", whole, (0, 0), 23)
    cuts = [whole[:5], whole[5:, :7], whole[5:, 7:]]
    places = [(0, 0), (5, 0), (5, 7)]
    assert sum(rectangle_sum("a", c, p, 23) for c, p in zip(cuts, places)) & MASK == total
    assert rectangle_sum("b", whole, (0, 0), 23) != total
    swapped = whole.clone()
    swapped[[3, 4]] = whole[[4, 3]]
    assert rectangle_sum("a", swapped, (0, 0), 23) != total


def test_any_single_bit_counts():
    weights = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    total = rectangle_sum("a", weights, (0, 0), 8)
    for bit in range(32):
        changed = weights.clone()
        changed.view(torch.int32)[6, 3] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert rectangle_sum("a", changed, (0, 0), 8) != total
