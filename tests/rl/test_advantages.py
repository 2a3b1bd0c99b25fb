"""GAE against cases worked by hand, against the recursion written in NumPy, and its identities."""

import numpy as np
import pytest
import torch

from megatron_vl.rl.advantages import discounted_sums, gae
from megatron_vl.rl.normalise import LEAST_VARIANCE, mean_and_deviation, moments, whiten
from tests.rl import plain


def ours(answers, gamma, lam):
    lengths = torch.tensor([len(a.values) for a in answers])
    rewards, values = (
        torch.tensor(np.concatenate([getattr(a, name) for a in answers])) for name in ("rewards", "values")
    )
    behind = torch.tensor([a.behind for a in answers], dtype=torch.float64)
    found = gae(rewards, values, lengths, behind, gamma, lam)
    return [part.numpy() for part in found.split(lengths.tolist())]


def answers_of(lengths, seed=0, terminal=False):
    rng = np.random.default_rng(seed)
    made = []
    for n in lengths:
        rewards = np.zeros(n) if terminal else rng.normal(size=n)
        rewards[-1] += rng.random()
        made.append(plain.Answer(rewards, rng.normal(size=n), 0.0 if terminal else rng.normal()))
    return made


def test_by_hand():
    """Three tokens, gamma 1/2, lambda 1/2, value 8 behind the end.

    delta = 1 + 4/2 - 2 = 1; 0 + 6/2 - 4 = -1; 2 + 8/2 - 6 = 0. A = 1 - 1/4 + 0, -1 + 0, 0.
    """
    answer = plain.Answer(np.array([1.0, 0, 2]), np.array([2.0, 4, 6]), 8.0)
    assert ours([answer], 0.5, 0.5)[0].tolist() == [0.75, -1.0, 0.0]


def test_terminal_reward_by_hand():
    """R = 1, V = .25, .5, .75: A = R - V."""
    answer = plain.Answer(np.array([0.0, 0, 1]), np.array([0.25, 0.5, 0.75]))
    assert ours([answer], 1.0, 1.0)[0].tolist() == [0.75, 0.5, 0.25]


@pytest.mark.parametrize(("gamma", "lam"), [(1, 1), (1, 0.95), (0.99, 0.95), (0.9, 0), (1, 0), (0.5, 1)])
@pytest.mark.parametrize("lengths", [[1], [7], [3, 1, 8, 2], [1, 1, 1], [33, 64, 65, 5]])
def test_is_the_recursion(lengths, gamma, lam):
    answers = answers_of(lengths)
    for found, answer in zip(ours(answers, gamma, lam), answers):
        np.testing.assert_allclose(found, plain.advantages(answer, gamma, lam), rtol=0, atol=1e-12)


def test_without_discount_the_return_is_the_reward_at_every_token():
    answers = answers_of([5, 1, 700, 32], terminal=True)
    for found, answer in zip(ours(answers, 1.0, 1.0), answers):
        reward = answer.rewards[-1]
        np.testing.assert_allclose(found, reward - answer.values, rtol=0, atol=1e-12)
        assert (np.float32(found + answer.values) == np.float32(reward)).all()


def test_a_cut_response_goes_on_with_the_value_at_the_cut():
    answer = plain.Answer(np.zeros(4), np.arange(4.0), behind=0.5)
    np.testing.assert_allclose(ours([answer], 1.0, 1.0)[0], 0.5 - np.arange(4.0))


def test_responses_do_not_see_each_other():
    answers = answers_of([4, 6, 3])
    together = ours(answers, 0.99, 0.9)
    for number, answer in enumerate(answers):
        assert (ours([answer], 0.99, 0.9)[0] == together[number]).all()


def test_lambda_zero_is_one_step_and_lambda_one_the_whole_return():
    (answer,) = answers_of([9])
    following = np.append(answer.values[1:], answer.behind)
    np.testing.assert_allclose(
        ours([answer], 0.9, 0)[0], answer.rewards + 0.9 * following - answer.values, atol=1e-12
    )
    powers = 0.9 ** np.arange(10)
    rest = [(powers[: 10 - t] * np.append(answer.rewards[t:], answer.behind)).sum() for t in range(9)]
    np.testing.assert_allclose(ours([answer], 0.9, 1)[0], np.array(rest) - answer.values, atol=1e-12)


def test_sums_refuse_segments_that_do_not_cover_the_terms():
    with pytest.raises(AssertionError):
        discounted_sums(torch.zeros(4), torch.tensor([1, 2]), 1.0)
    assert discounted_sums(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 1.0).numel() == 0


def test_normalisation_over_parts_is_that_of_the_whole():
    rng = np.random.default_rng(1)
    parts = [rng.normal(3, 7, size=n) for n in (5, 1, 40)]
    sums = sum(moments(torch.tensor(p)) for p in parts)
    for ours_, theirs in zip(parts, plain.whitened(parts)):
        np.testing.assert_allclose(whiten(torch.tensor(ours_), sums).numpy(), theirs, rtol=0, atol=1e-9)
    alone = [whiten(torch.tensor(p), moments(torch.tensor(p))).numpy() for p in parts]
    assert np.abs(np.concatenate(alone) - np.concatenate(plain.whitened(parts))).max() > 0.1, (
        "the test must see normalisation per part"
    )


def test_equal_advantages_become_zero():
    values = torch.full((6,), 0.3, dtype=torch.float64)
    sums = moments(values)
    assert mean_and_deviation(sums) == pytest.approx((0.3, LEAST_VARIANCE**0.5))
    assert whiten(values, sums).abs().max() < 1e-6
