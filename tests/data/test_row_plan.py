"""Looking up a plan: the same rows for every data-parallel size, near in work, at any step at once."""

import pickle
from collections import Counter

import numpy as np
import pytest

from megatron_vl.config.mixture import MixturePhase
from megatron_vl.config.model import ModelConfig
from megatron_vl.data.row_plan import PlannedRow, assign_rows, balance_of
from megatron_vl.errors import DataError
from megatron_vl.plan.row_work import WorkRates
from tests.data.planned import LENGTH, documents_in, image_index, index_of, plan_of, text_index

TEXT, VQA = text_index("text", 3000, 1, 0.02), image_index("vqa", 900, 2, 0.02)
STEPS = 60
PHASES = (MixturePhase(tokens=25 * 8 * LENGTH, text_share=0.7), MixturePhase(text_share=0.4))
PLAN = plan_of([TEXT, VQA], num_steps=STEPS, phases=PHASES)


def test_rows_keep_the_limits_and_report_the_refused():
    limited = plan_of([TEXT, VQA], num_steps=STEPS, phases=PHASES, max_globals=5, max_crops=16)
    for plan, limits in ((PLAN, (10**9, 10**9)), (limited, (5, 16))):
        seen = Counter()
        for step in range(STEPS):
            rows = plan.step(step)
            assert len(rows) == 8
            for row in rows:
                padded = sum(-(-d.tokens // 16) * 16 for d in row.documents)
                assert 0 < padded <= LENGTH and row.tokens == sum(d.tokens for d in row.documents)
                assert sum(d.num_globals for d in row.documents) <= limits[0]
                assert sum(d.num_crops for d in row.documents) <= limits[1]
                seen.update(d.refused for d in row.documents if not d.tokens)
        assert set(seen) == {"missing"} and seen["missing"] > 20
    assert any(sum(d.num_crops for d in row.documents) > 16 for s in range(STEPS) for row in PLAN.step(s))


def test_documents_that_fit_no_row_are_refused_with_the_reason():
    long = index_of("text", [LENGTH, LENGTH + 1, 50, 60, 70])
    many = index_of("vqa", [900, 900, 900, 900], [1, 4, 1, 1], [2, 2, 40, 2])
    plan = plan_of([long, many], num_steps=2, max_globals=3, max_crops=30, look_ahead_rows=4)
    found = {(d.domain, d.index): d for step in range(2) for row in plan.step(step) for d in row.documents}
    assert {place: d.refused for place, d in found.items() if d.refused} == {
        (0, 1): "too_long",
        (1, 1): "too_many_views",
        (1, 2): "too_many_views",
    }
    assert found[0, 0].tokens == LENGTH
    assert [domain.refused() for domain in plan.domains] == [{"too_long": 1}, {"too_many_views": 2}]


def test_any_data_parallel_size_sees_the_same_rows_of_near_work():
    for step in range(STEPS):
        rows = PLAN.step(step)
        for dp_size in (1, 2, 4, 8):
            shares = assign_rows(rows, dp_size)
            assert [len(share) for share in shares] == [8 // dp_size] * dp_size
            assert sorted(map(id, sum(shares, []))) == sorted(map(id, rows))
            for micro_batch in range(8 // dp_size):
                together = [share[micro_batch] for share in shares]
                neighbours = rows[micro_batch * dp_size : (micro_batch + 1) * dp_size]
                assert sorted(map(id, together)) == sorted(map(id, neighbours))
        assert [row.work for row in rows] == sorted((row.work for row in rows), reverse=True)


def test_sums_of_the_ranks_are_near():
    """Not only the rows of a micro-batch: the rank with the heaviest first row gets the lightest second."""
    rows = [PlannedRow((), work, work) for work in (9, 8, 7, 6, 5, 4, 3, 2)]
    shares = assign_rows(rows, 2)
    assert [[row.work for row in share] for share in shares] == [[9, 6, 5, 2], [8, 7, 4, 3]]
    indices = [text_index("text", 20_000, 1), image_index("vqa", 8000, 2)]
    plan = plan_of(indices, 30, seq_length=32_768, rates=WorkRates.of(ModelConfig()))
    balances = {
        dp: [balance_of(assign_rows(plan.step(step), dp), plan.settings) for step in range(30)]
        for dp in (1, 2, 4)
    }
    assert all(b.vision == b.total == 1 for b in balances[1])
    assert np.mean([b.vision for b in balances[2]]) < 1.05
    assert np.mean([b.vision for b in balances[4]]) < 1.1
    assert np.mean([b.total for b in balances[4]]) < 1.05


def test_no_vision_is_even():
    rows = [PlannedRow((), 5, 0), PlannedRow((), 5, 0)]
    assert balance_of([rows[:1], rows[1:]], PLAN.settings).vision == 1.0


def test_a_step_needs_nothing_that_came_before():
    straight = [documents_in(PLAN.step(step)) for step in range(STEPS)]
    fresh = pickle.loads(pickle.dumps(PLAN))
    for step in (47, 3, 59, 24, 25):
        assert documents_in(fresh.step(step)) == straight[step]


def test_long_documents_are_spread_over_the_steps_of_a_window():
    """The packer's rows come longest first; trained on so, the steps of a window would differ in kind."""
    plan = plan_of([TEXT, VQA], num_steps=STEPS, look_ahead_rows=80)
    longest = [max(d.tokens for row in plan.step(s) for d in row.documents) for s in range(10)]
    assert min(longest) > LENGTH // 3


def test_behind_the_end():
    with pytest.raises(DataError, match="step 60 is not in the plan of 60 steps"):
        PLAN.step(60)
