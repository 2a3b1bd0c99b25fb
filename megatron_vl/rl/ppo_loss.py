"""Losses of PPO per token. Sums are the caller's, and the one division by the count of all ranks is the schedule's.

All tensors are fp32 ``[n]``: the response tokens of a micro-batch on this rank, masked ones already left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vl.config.rl import PpoConfig

LARGEST_LOG_RATIO = 20.0  # e^20: beyond it a ratio only overflows; its gradient is 0 there


@dataclass(frozen=True)
class PolicyTokens:
    """logprobs: of the policy that learns, with gradient. old_logprobs: of the trainer's weights before the
    iteration, None where the ratio does not need them. sampler_logprobs: as reported by the rollout engine.
    reference_logprobs: of the reference policy; entropy: with gradient; None where not used.
    """

    logprobs: torch.Tensor
    advantages: torch.Tensor
    sampler_logprobs: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    @property
    def before(self) -> torch.Tensor:
        """Log-probabilities of the policy to compare with: the old ones, or the present ones as constants."""
        return self.logprobs.detach() if self.old_logprobs is None else self.old_logprobs


@dataclass(frozen=True)
class PolicyTerms:
    """Per token. loss: what is summed, with gradient. surrogate: its part without KL and entropy.

    ratio: policy against `PolicyTokens.before`. clipped_low, clipped_high, dual: where each clip acts. weight: the
    truncated importance weight; untruncated: before its limit. kl: in the loss, None without.
    """

    loss: torch.Tensor
    surrogate: torch.Tensor
    ratio: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    dual: torch.Tensor
    weight: torch.Tensor
    untruncated: torch.Tensor
    kl: torch.Tensor | None


def ratio_of(logprobs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """``exp(logprobs - others)``, exactly 1 where they are the same numbers."""
    return (logprobs - others).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def policy_terms(tokens: PolicyTokens, ppo: PpoConfig) -> PolicyTerms:
    """``-w min(r A, clip(r, 1 - low, 1 + high) A)``, plus KL and minus entropy with their weights.

    dual_clip ``c``: for A < 0 the minimum is at least ``c A`` (arXiv 1912.09729). ratio_mode ``none``: ``-w A log p``
    instead, whose gradient is that of ``detached``. ``w`` is a constant of the token.
    """
    advantages = tokens.advantages
    ratio = ratio_of(tokens.logprobs, tokens.before)
    gain = ratio * advantages
    bounded = ratio.clamp(1.0 - ppo.clip_low, 1.0 + ppo.clip_high) * advantages
    clipped = bounded < gain
    surrogate = torch.minimum(gain, bounded)
    dual = torch.zeros_like(clipped)
    if ppo.dual_clip is not None:
        floor = ppo.dual_clip * advantages
        dual = (advantages < 0) & (surrogate < floor)
        surrogate = torch.where(dual, floor, surrogate)
    if ppo.ratio_mode == "none":
        surrogate, clipped = tokens.logprobs * advantages, torch.zeros_like(clipped)
    untruncated = ratio_of(tokens.before, tokens.sampler_logprobs).detach()
    weight = torch.ones_like(untruncated) if ppo.tis_clip is None else untruncated.clamp(max=ppo.tis_clip)
    loss, kl = -weight * surrogate, None
    if ppo.kl_coef > 0:
        assert tokens.reference_logprobs is not None, "the KL is taken to a reference policy"
        kl = kl_estimate(tokens.logprobs, tokens.reference_logprobs, ppo.kl_form)
        loss = loss + ppo.kl_coef * kl
    if ppo.entropy_coef > 0:
        assert tokens.entropy is not None, "the entropy must have been computed"
        loss = loss - ppo.entropy_coef * tokens.entropy
    low, high = clipped & (advantages < 0), clipped & (advantages > 0)
    return PolicyTerms(loss, -weight * surrogate, ratio, low, high, dual, weight, untruncated, kl)


def kl_estimate(logprobs: torch.Tensor, others: torch.Tensor, form: str) -> torch.Tensor:
    """Estimate per token of KL(p || q) from tokens drawn from ``p``; ``l = log p - log q``.

    k1: ``l``, unbiased. k2: ``l^2 / 2``, whose gradient is that of the KL. k3: ``exp(-l) - 1 + l``, unbiased and
    never negative. (joschu.net/blog/kl-approx.html.)
    """
    difference = logprobs - others
    if form == "k1":
        return difference
    if form == "k2":
        return 0.5 * difference.square()
    assert form == "k3", form
    limited = difference.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return torch.exp(-limited) - 1.0 + limited


@dataclass(frozen=True)
class ValueTerms:
    """Per token. loss: with gradient. clipped: where the clipped value's error is the larger one."""

    loss: torch.Tensor
    clipped: torch.Tensor


def value_terms(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> ValueTerms:
    """``1/2 (V - G)^2``; with a clip the larger of that and the same with V within ``old_values +- clip``."""
    plain = 0.5 * (values - returns).square()
    if clip is None:
        return ValueTerms(plain, torch.zeros_like(plain, dtype=torch.bool))
    near = old_values + (values - old_values).clamp(-clip, clip)
    bounded = 0.5 * (near - returns).square()
    return ValueTerms(torch.maximum(plain, bounded), bounded > plain)
