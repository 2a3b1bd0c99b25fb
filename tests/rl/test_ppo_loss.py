"""Losses and their gradients against cases worked by hand and against NumPy, to 1e-6."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vl.config.rl import PpoConfig
from megatron_vl.rl.ppo_loss import PolicyTokens, kl_estimate, policy_terms, value_terms
from tests.rl import plain

LOG2 = math.log(2)
PLAIN = PpoConfig(tis_clip=None)


def tokens(logprobs, advantages, old=None, sampler=None, **others):
    made = [torch.tensor(x, dtype=torch.float32) for x in (logprobs, advantages)]
    old = None if old is None else torch.tensor(old, dtype=torch.float32)
    sampler = made[0].clone() if sampler is None else torch.tensor(sampler, dtype=torch.float32)
    return PolicyTokens(made[0].requires_grad_(), made[1], sampler, old, **others)


def loss_and_gradient(made, config):
    terms = policy_terms(made, config)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), made.logprobs)
    return terms, gradient


def test_by_hand():
    """Ratio 2 or 1/2, advantage +1 or -1, clip 0.2: only the two that gain by going further are clipped."""
    made = tokens([LOG2, -LOG2, LOG2, -LOG2], [1, 1, -1, -1], old=[0, 0, 0, 0])
    terms, gradient = loss_and_gradient(made, PLAIN)
    assert terms.loss.tolist() == pytest.approx([-1.2, -0.5, 2.0, 0.8])
    assert gradient.tolist() == pytest.approx([0, -0.5, 2.0, 0])
    assert terms.clipped_high.tolist() == [True, False, False, False]
    assert terms.clipped_low.tolist() == [False, False, False, True]
    assert not terms.dual.any()


def test_uneven_clip_by_hand():
    made = tokens([math.log(1.25), math.log(0.65)], [1, -1], old=[0, 0])
    terms, _ = loss_and_gradient(made, replace(PLAIN, clip_low=0.3, clip_high=0.28))
    assert terms.loss.tolist() == pytest.approx([-1.25, 0.7])
    assert (terms.clipped_high.tolist(), terms.clipped_low.tolist()) == ([False, False], [False, True])


def test_dual_clip_by_hand():
    """Ratio 8 at advantage -1 costs 3, not 8, and has no gradient; at advantage +1 it is clipped as ever."""
    made = tokens([3 * LOG2, 3 * LOG2], [-1, 1], old=[0, 0])
    terms, gradient = loss_and_gradient(made, replace(PLAIN, dual_clip=3.0))
    assert terms.loss.tolist() == pytest.approx([3, -1.2]) and gradient.tolist() == [0, 0]
    assert terms.dual.tolist() == [True, False]


def test_truncated_importance_weight_by_hand():
    """The trainer finds 4 and 16 times the sampler's probability; C = 8. The weight is a constant."""
    made = tokens([0.0, 0.0], [1, 1], old=[0, 0], sampler=[-2 * LOG2, -4 * LOG2])
    terms, gradient = loss_and_gradient(made, PpoConfig())
    assert terms.weight.tolist() == pytest.approx([4, 8])
    assert terms.untruncated.tolist() == pytest.approx([4, 16])
    assert gradient.tolist() == pytest.approx([-4, -8])


def test_without_old_logprobs_the_ratio_is_exactly_one():
    made = tokens(np.random.default_rng(0).normal(-2, 3, 500).tolist(), [1.0] * 250 + [-1.0] * 250)
    config = replace(PLAIN, ratio_mode="detached", strict_on_policy=True, mini_batches=1)
    terms, gradient = loss_and_gradient(made, config)
    assert (terms.ratio == 1).all() and not (terms.clipped_low | terms.clipped_high).any()
    assert torch.equal(gradient, -made.advantages)
    without, same = loss_and_gradient(made, replace(config, ratio_mode="none"))
    assert torch.equal(same, gradient), "no ratio has the gradient of a ratio of 1"
    assert torch.allclose(without.loss, -made.logprobs * made.advantages)


@pytest.mark.parametrize("dual", [None, 1.5, 3.0])
@pytest.mark.parametrize("tis", [None, 1.3])
@pytest.mark.parametrize("clips", [(0.2, 0.2), (0.1, 0.4)])
def test_policy_loss_is_numpys(dual, tis, clips):
    rng = np.random.default_rng(2)
    logprobs, advantages = rng.normal(-1, 0.6, 400), rng.normal(size=400)
    old, sampler = logprobs + rng.normal(0, 0.5, 400), logprobs + rng.normal(0, 0.5, 400)
    config = PpoConfig(clip_low=clips[0], clip_high=clips[1], dual_clip=dual, tis_clip=tis)
    made = tokens(logprobs, advantages, old, sampler)
    terms, gradient = loss_and_gradient(made, config)
    expected = [
        plain.policy_token_loss(*row, *clips, dual, tis) for row in zip(logprobs, old, sampler, advantages)
    ]
    np.testing.assert_allclose(terms.loss.detach(), [e[0] for e in expected], rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, [e[1] for e in expected], rtol=3e-6, atol=1e-6)
    assert terms.clipped_low.any() and terms.clipped_high.any()
    assert bool(terms.dual.any()) == (dual is not None)


def test_kl_and_entropy_are_added_with_their_weights():
    made = tokens([-1.0, -2.0], [0.5, -0.5], old=[-1.0, -2.0])
    made = replace(made, reference_logprobs=torch.tensor([-1.5, -1.0]), entropy=torch.tensor([0.7, 0.1]))
    bare = policy_terms(made, PLAIN).loss.detach().numpy()
    for form in ("k2", "k3"):
        config = replace(PLAIN, kl_coef=0.5, kl_form=form, entropy_coef=0.1)
        kl = np.array([plain.kl_token(-1.0, -1.5, form), plain.kl_token(-2.0, -1.0, form)])
        expected = bare + 0.5 * kl - 0.1 * np.array([0.7, 0.1])
        np.testing.assert_allclose(policy_terms(made, config).loss.detach(), expected, atol=1e-6)


@pytest.mark.parametrize("form", ["k1", "k2", "k3"])
def test_kl_estimates(form):
    rng = np.random.default_rng(3)
    ours, others = rng.normal(-2, 1, 50), rng.normal(-2, 1, 50)
    found = kl_estimate(torch.tensor(ours), torch.tensor(others), form)
    np.testing.assert_allclose(found, [plain.kl_token(*pair, form) for pair in zip(ours, others)], rtol=1e-9)


def test_kl_estimates_are_of_the_kl():
    """Two distributions over five words; the mean under p, exactly. k2 is only near."""
    p, q = (
        torch.tensor(x, dtype=torch.float64)
        for x in ([0.2, 0.3, 0.1, 0.25, 0.15], [0.25, 0.2, 0.15, 0.2, 0.2])
    )
    exact = (p * (p / q).log()).sum()
    for form, tolerance in (("k1", 1e-12), ("k3", 1e-12), ("k2", 5e-3)):
        assert abs((p * kl_estimate(p.log(), q.log(), form)).sum() - exact) < tolerance


def test_value_loss_by_hand():
    """Old value 0, clip 0.2, return 1. V = 0.5: clipped to 0.2, its error is larger. V = -1: the plain one is."""
    values = torch.tensor([0.5, -1.0, 0.1], requires_grad=True)
    zeros, ones = torch.zeros(3), torch.ones(3)
    terms = value_terms(values, zeros, ones, 0.2)
    assert terms.loss.tolist() == pytest.approx([0.32, 2.0, 0.405])
    assert terms.clipped.tolist() == [True, False, False]
    (gradient,) = torch.autograd.grad(terms.loss.sum(), values)
    # at V = 0.1 both errors are equal: maximum() shares the gradient, and both shares are the same
    assert gradient.tolist() == pytest.approx([0, -2.0, -0.9])
    assert value_terms(values, zeros, ones, None).loss.tolist() == pytest.approx([0.125, 2.0, 0.405])


@pytest.mark.parametrize("clip", [None, 0.2, 2.0])
def test_value_loss_is_numpys(clip):
    rng = np.random.default_rng(4)
    values, old, goal = rng.normal(size=300), rng.normal(size=300), rng.random(300)
    terms = value_terms(*(torch.tensor(x) for x in (values, old, goal)), clip)
    expected = [plain.value_token_loss(*row, clip) for row in zip(values, old, goal)]
    np.testing.assert_allclose(terms.loss, expected, rtol=1e-12)
    assert bool(terms.clipped.any()) == (clip is not None)


def test_a_ratio_out_of_all_bounds_stays_finite():
    made = tokens([0.0, -300.0], [-1, 1], old=[-300.0, 0.0], sampler=[-300.0, 0.0])
    terms, gradient = loss_and_gradient(made, PpoConfig())
    assert torch.isfinite(terms.loss).all() and torch.isfinite(gradient).all()
