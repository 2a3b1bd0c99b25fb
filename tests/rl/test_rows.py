"""Trajectories to rows: each exactly once, even work, numbers at the positions that predict their tokens."""

import random
from dataclasses import replace

import pytest
import torch

from megatron_vl.data.template import NOT_SCORED
from megatron_vl.errors import DataError
from megatron_vl.plan.row_work import WorkRates
from megatron_vl.rl.rows import RowShape, make_batches, plan_rows
from tests.fixtures.small import SMALL
from tests.rl.made import SPECS, features_of, make_trajectories

RATES = WorkRates.of(SMALL)
PACKED, DENSE = RowShape(96, True, 8), RowShape(64, False, 1, 3)
TEXTS = [([], random.Random(n).randrange(3, 28), 2) for n in range(61)]


def numbers(plan):
    return [n for piece in plan for rank in piece for rows in rank for n in rows.numbers]


@pytest.mark.parametrize("shape", [PACKED, DENSE, replace(PACKED, rounds=2)])
@pytest.mark.parametrize(("pieces", "dp"), [(1, 1), (4, 1), (1, 3), (4, 2), (6, 4)])
def test_each_trajectory_once_and_as_many_micro_batches_everywhere(shape, pieces, dp):
    made = make_trajectories(TEXTS)
    plan = plan_rows(made, shape, RATES, pieces, dp)
    assert sorted(numbers(plan)) == list(range(len(made)))
    for piece in plan:
        assert len(piece) == dp and len({len(rank) for rank in piece}) == 1
        assert len(piece[0]) % shape.rounds == 0 and len(piece[0]) > 0
        for rows in (rows for rank in piece for rows in rank):
            lengths = [shape.padded(made[n].num_tokens) for n in rows.numbers]
            assert sum(lengths) <= 96 if shape.packed else len(lengths) <= 3
    counts = [sum(len(rows.numbers) for rank in piece for rows in rank) for piece in plan]
    assert max(counts) - min(counts) <= 1
    assert plan == plan_rows(make_trajectories(TEXTS), shape, RATES, pieces, dp)


def test_pieces_and_ranks_have_even_work():
    made = make_trajectories(TEXTS)
    plan = plan_rows(made, PACKED, RATES, 4, 2)

    def work(rows_of):
        return sum(
            RATES.per_token * made[n].num_tokens + RATES.document(made[n].num_tokens, 0, 0)
            for rows in rows_of
            for n in rows.numbers
        )

    per_piece = [sum(work(rank) for rank in piece) for piece in plan]
    assert max(per_piece) / min(per_piece) < 1.05
    in_order = [sum(t.num_tokens for t in made[i::4]) for i in range(4)]
    assert max(in_order) / min(in_order) > 1.05, "the test must see pieces taken by number alone"


def test_too_few_and_too_long():
    made = make_trajectories(SPECS[:3])
    with pytest.raises(DataError, match=r"3 usable trajectories for 4 optimizer steps; sample more"):
        plan_rows(made, PACKED, RATES, 4, 1)
    with pytest.raises(DataError, match=r"p1/0 has 23 tokens, more than a row of data.seq_length = 16"):
        plan_rows(made[1:2], replace(PACKED, seq_length=16), RATES, 1, 1)


@pytest.mark.parametrize("shape", [PACKED, DENSE])
def test_numbers_stand_where_their_tokens_are_predicted(shape):
    made = make_trajectories()
    (piece,) = plan_rows(made, shape, RATES, 1, 1)
    (batches,) = make_batches(made, [piece[0]], shape, SMALL.tokens.endoftext, features_of)
    seen = {}
    for item in batches:
        labels = item.batch.labels
        assert item.input_ids.shape == ((1, 96) if shape.packed else (3, 64))
        covered = torch.zeros_like(labels, dtype=torch.bool)
        for span in item.spans:
            response = made[span.number].response
            assert labels[span.targets].tolist() == list(response.tokens)
            row, place = span.behind
            assert item.input_ids[row, place] == response.tokens[-1] and labels[row, place] == NOT_SCORED
            assert item.tokens("sampler_logprobs")[span.number].tolist() == pytest.approx(response.logprobs)
            covered[span.targets] = True
            seen[span.number] = item
        assert torch.equal(covered, labels != NOT_SCORED), "nothing else is learnt"
        shown = [made[s.number].prompt for s in item.spans if made[s.number].prompt.view_kinds]
        assert item.batch.view_kinds == [kind for prompt in shown for kind in prompt.view_kinds]
        if shown:
            assert torch.equal(item.features, torch.cat([features_of(prompt) for prompt in shown]))
        else:
            assert item.features is None
    assert sorted(seen) == list(range(len(made)))


def test_an_empty_micro_batch_has_the_shape_of_the_others():
    made = make_trajectories(SPECS[:1])
    (piece,) = plan_rows(made, PACKED, RATES, 1, 2)
    for rank in piece:
        ((item,),) = make_batches(made, [rank], PACKED, SMALL.tokens.endoftext, features_of)
        assert item.input_ids.shape == (1, 96)
        assert len(item.spans) == (item.batch.labels != NOT_SCORED).any()
