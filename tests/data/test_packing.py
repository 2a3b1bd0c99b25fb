"""Packing one window: every document once, no limit broken, few rows, even work."""

import numpy as np
import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.data.packing import Documents, PackRule, least_rows, pack_window
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.row_work import WorkRates
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_step

RATES = WorkRates.of(ModelConfig())


def documents(tokens, globals_=None, crops=None, pad=1) -> Documents:
    tokens = np.array(tokens, dtype=np.int64)
    globals_, crops = (
        np.zeros_like(tokens) if v is None else np.array(v, dtype=np.int64) for v in (globals_, crops)
    )
    work = globals_ * RATES.per_global + crops * RATES.per_crop + tokens**2 * RATES.per_token_squared
    return Documents(-(-tokens // pad), globals_, crops, work)


def realistic(rng, rows: int, length: int, image_share: float, pad: int) -> Documents:
    """About `rows` rows' worth of conversations: log-normal text, and images of 1 to 3 x 0 to 9 crops."""
    count = rows * length // 400
    globals_ = rng.integers(1, 4, count) * (rng.random(count) < image_share)
    crops = globals_ * rng.integers(0, 10, count)
    tokens = np.exp(rng.normal(7.0, 1.2, count)).astype(int) // np.where(globals_ > 0, 5, 1) + 20
    tokens = np.minimum(tokens + 171 * globals_ + 83 * crops, length)
    keep = int(np.searchsorted(np.cumsum(tokens), rows * length))
    return documents(tokens[:keep], globals_[:keep], crops[:keep], pad)


def per_row(row_of, values, num_rows):
    return np.bincount(row_of[row_of >= 0], weights=values[row_of >= 0], minlength=num_rows)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_every_document_in_one_row_and_no_limit_broken(seed, balance):
    rng = np.random.default_rng(seed)
    capacity, count = int(rng.integers(3, 400)), int(rng.integers(0, 300))
    sizes = rng.choice([capacity // 20 + 1, capacity // 3 + 1, capacity], count)
    units = np.minimum(rng.integers(0, sizes + 1), capacity)
    max_globals, max_crops = (None if rng.random() < 0.3 else int(rng.integers(1, 12)) for _ in range(2))
    globals_ = rng.integers(0, 1 + min(3, max_globals or 3), count) * (units > 0)
    crops = rng.integers(0, 1 + min(9, max_crops or 9), count) * (globals_ > 0)
    window = documents(units, globals_, crops)
    rule = PackRule(capacity, max_globals, max_crops, balance)
    row_of, num_rows = pack_window(window, rule)
    assert np.array_equal(row_of >= 0, units > 0)
    assert num_rows >= least_rows(window, rule)
    totals = [per_row(row_of, values, num_rows) for values in (units, globals_, crops)]
    if count and units.any():
        assert set(row_of[units > 0]) == set(range(num_rows)), "no empty row"
        assert totals[0].max() <= capacity
        assert max_globals is None or totals[1].max() <= max_globals
        assert max_crops is None or totals[2].max() <= max_crops
    again, _ = pack_window(window, rule)
    assert np.array_equal(row_of, again)


def test_best_fit_takes_the_tightest_row():
    """6 and 5 open rows with room for 4 and 5; 4 fits best beside 6, 5 beside 5, and 1 nowhere."""
    row_of, num_rows = pack_window(documents([6, 5, 5, 4, 1]), PackRule(10, balance=False))
    assert row_of.tolist() == [0, 1, 1, 0, 2] and num_rows == 3


def test_limits_on_views_open_rows():
    window = documents([1, 1, 1, 1], [2, 2, 2, 2], [0, 9, 9, 0])
    for balance in (True, False):
        assert pack_window(window, PackRule(100, balance=balance))[1] == 1
        assert pack_window(window, PackRule(100, max_globals=4, balance=balance))[1] == 2
        assert pack_window(window, PackRule(100, max_globals=3, balance=balance))[1] == 4
        assert pack_window(window, PackRule(100, max_crops=9, balance=balance))[1] == 2


def test_what_fits_no_row_is_not_for_the_packer():
    with pytest.raises(AssertionError, match="longer than a row"):
        pack_window(documents([11]), PackRule(10))
    with pytest.raises(AssertionError, match="more views"):
        pack_window(documents([1], [3]), PackRule(10, max_globals=2))


@pytest.mark.parametrize(
    ("length", "image_share"), [(131_072, 0.1), (131_072, 0.7), (32_768, 0.5), (32_768, 0)]
)
def test_efficiency_on_realistic_documents(length, image_share):
    """The number of rows is the lower bound or one more; what is lost is the last row and the padding."""
    rng = np.random.default_rng(5)
    pad = 32
    window = realistic(rng, 128, length, image_share, pad)
    for balance in (True, False):
        row_of, num_rows = pack_window(window, PackRule(length // pad, balance=balance))
        least = least_rows(window, PackRule(length // pad))
        assert num_rows <= least + 1
        assert window.units.sum() * pad / (num_rows * length) > 0.985


@pytest.mark.parametrize(("image_share", "spread_of_plain"), [(0.1, 5.5), (0.3, 3.0), (0.8, 1.5), (1.0, 1.2)])
def test_work_is_spread_without_more_rows(image_share, spread_of_plain):
    """Vision work, largest over mean of the rows; no row has more work in all than the heaviest document
    makes necessary."""
    window = realistic(np.random.default_rng(6), 128, 131_072, image_share, 32)
    vision = window.globals_ * RATES.per_global + window.crops * RATES.per_crop
    spread, rows = {}, {}
    for balance in (True, False):
        row_of, rows[balance] = pack_window(window, PackRule(4096, balance=balance))
        work, views = (
            per_row(row_of, values.astype(float), rows[balance]) for values in (window.work, vision)
        )
        spread[balance] = views.max() / views.mean()
        assert not balance or work.max() <= 1.1 * max(work.mean(), window.work.max())
    assert spread[True] < 1.2 and spread[False] > 0.95 * spread_of_plain
    assert rows[True] == rows[False]


@pytest.mark.parametrize("image_share", [0.1, 0.4])  # as the two SFT examples mix text and images
@pytest.mark.parametrize(("rows", "ranks"), [(8, 8), (32, 32), (32, 128)])
def test_vision_work_of_a_step_over_the_ranks_of_a_pipeline(rows, ranks, image_share):
    """Placement all, the example's 32 rows of 128k a step: the rank with most has at most 1.1 times the mean; shared
    out row by row, as on a first stage, they wait longer for each other."""
    window = realistic(np.random.default_rng(7), rows, 131_072, image_share, 32)
    row_of, num_rows = pack_window(window, PackRule(4096))
    counts = [per_row(row_of, values, num_rows).astype(int) for values in (window.crops, window.globals_)]
    step = [[CROP] * crops + [GLOBAL] * whole for crops, whole in zip(*counts)]
    costs = view_costs(ModelConfig())

    def waited(together: bool) -> float:
        shares = share_step(step, ranks, costs, together)
        work = [
            [sum(costs[kinds[view]] for view in mine) for mine in of_ranks]
            for kinds, of_ranks in zip(step, shares)
        ]
        most = max(map(sum, zip(*work))) if together else sum(map(max, work))
        return most * ranks / sum(map(sum, work))

    assert waited(True) <= min(1.1, waited(False) + 1e-9)


def test_balance_gives_way_when_it_costs_rows():
    """Lengths of about a fifth and a quarter of a row, nothing short to fill with: spreading costs 3% more rows."""
    rng = np.random.default_rng(0)
    window = documents(rng.choice([19, 21, 24], 1200), rng.integers(0, 2, 1200) * 9)
    rows = {balance: pack_window(window, PackRule(100, balance=balance))[1] for balance in (True, False)}
    assert rows[True] == rows[False] == 281
