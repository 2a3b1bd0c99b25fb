"""Sharing views out: every view once, in order, and by cost as evenly as views allow."""

import itertools
import time
from fractions import Fraction

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_views

RELEASED = view_costs(ModelConfig())
ALL_KINDS = [kinds for length in range(8) for kinds in itertools.product((CROP, GLOBAL), repeat=length)]
COSTS = [RELEASED, (1, 1), (2, 3), (1, 4), (5, 2)]


def loads(kinds, shares, costs):
    return [sum(costs[kinds[index]] for index in share) for share in shares]


def least_possible(num_crops: int, num_globals: int, size: int, costs: tuple[int, int]) -> int:
    """The smallest largest load over all ways of dealing the views out."""
    states = {(num_crops, num_globals, 0)}
    for _ in range(size - 1):
        states = {
            (crops - c, wholes - g, max(worst, c * costs[CROP] + g * costs[GLOBAL]))
            for crops, wholes, worst in states
            for c in range(crops + 1)
            for g in range(wholes + 1)
        }
    return min(max(worst, c * costs[CROP] + g * costs[GLOBAL]) for c, g, worst in states)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("costs", COSTS)
def test_every_view_once_in_order_and_within_one_view_of_the_mean(size, costs):
    for kinds in ALL_KINDS:
        shares = share_views(kinds, size, costs)
        for kind in (CROP, GLOBAL):
            of_kind = [[index for index in share if kinds[index] == kind] for share in shares]
            wanted = [index for index, other in enumerate(kinds) if other == kind]
            assert [index for share in of_kind for index in share] == wanted  # contiguous blocks, ascending
        for share in shares:
            assert [kinds[index] for index in share] == sorted(kinds[index] for index in share)
        found = loads(kinds, shares, costs)
        assert max(found) <= Fraction(sum(found), size) + (max(costs[k] for k in kinds) if kinds else 0)


@pytest.mark.parametrize(("size", "most"), [(2, 9), (3, 8), (4, 6)])
@pytest.mark.parametrize("costs", COSTS)
def test_no_share_is_far_from_the_best_that_there_is(size, most, costs):
    bound = Fraction(4, 3) - Fraction(1, 3 * size)
    for num_crops, num_globals in itertools.product(range(most), repeat=2):
        kinds = [CROP] * num_crops + [GLOBAL] * num_globals
        worst = max(loads(kinds, share_views(kinds, size, costs), costs))
        assert worst <= bound * least_possible(num_crops, num_globals, size, costs)


def test_each_view_goes_to_the_rank_that_has_least():
    """The counts in closed form are those of dealing view by view."""
    for costs, size, num_crops, num_globals in itertools.product(COSTS, (1, 2, 3, 5), range(12), range(7)):
        expected = [0] * size
        for cost in sorted([costs[CROP]] * num_crops + [costs[GLOBAL]] * num_globals, reverse=True):
            expected[expected.index(min(expected))] += cost
        kinds = [CROP] * num_crops + [GLOBAL] * num_globals
        found = loads(kinds, share_views(kinds, size, costs), costs)
        assert max(found) == max(expected) and sorted(found) == sorted(expected)


def test_equal_costs_give_equal_counts():
    for kinds in ALL_KINDS:
        counts = [len(share) for share in share_views(kinds, 3, (7, 7))]
        assert max(counts) - min(counts) <= 1


def test_crops_fill_what_a_spare_global_leaves():
    kinds = [CROP, CROP, CROP, CROP, CROP, CROP, CROP, GLOBAL, GLOBAL, GLOBAL]
    assert share_views(kinds, 2, (10, 23)) == [[0, 1, 7, 8], [2, 3, 4, 5, 6, 9]]  # 66 and 73
    assert share_views(kinds[:6] + [GLOBAL], 2, (10, 23)) == [[0, 1, 6], [2, 3, 4, 5]]


def test_a_long_row_is_even_and_cheap():
    kinds = ([CROP] * 36 + [GLOBAL]) * 400
    begin = time.perf_counter()
    shares = share_views(kinds, 32, RELEASED)
    assert time.perf_counter() - begin < 0.25  # some milliseconds when nothing else runs
    found = loads(kinds, shares, RELEASED)
    assert max(found) * 32 <= 1.003 * sum(found)


def test_misuse():
    with pytest.raises(ValueError, match="at least one rank"):
        share_views([CROP], 0, (1, 2))
    with pytest.raises(ValueError, match="every view is CROP"):
        share_views([2], 1, (1, 2))
    with pytest.raises(ValueError, match="costs something"):
        share_views([CROP], 1, (0, 2))
