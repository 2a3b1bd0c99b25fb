"""Scores of tokens from whole logits on one rank, in fp64, written apart from the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Case:
    """hidden ``[S, b, h]``, weight ``[V, h]`` without padding, labels ``[b, S]`` (-100 = not scored), factors of the
    losses and of the entropy in the sum that is differentiated ``[b, S]``."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    of_loss: torch.Tensor
    of_entropy: torch.Tensor


def make_case(
    length: int, batch: int, vocab: int, width: int = 24, share: float = 0.6, seed: int = 0
) -> Case:
    """Random values; ``share`` of the labels is scored. Hidden states make some logits large."""
    generator = torch.Generator().manual_seed(seed)
    scored = torch.rand(batch, length, generator=generator) < share
    labels = torch.randint(vocab, (batch, length), generator=generator).where(scored, torch.tensor(-100))
    return Case(
        torch.randn(length, batch, width, generator=generator),
        torch.randn(vocab, width, generator=generator),
        labels,
        torch.randn(batch, length, generator=generator),
        torch.randn(batch, length, generator=generator),
    )


@dataclass
class Expected:
    """fp64; losses and entropy ``[b, S]``, 0 where not scored; best: -1 there."""

    losses: torch.Tensor
    entropy: torch.Tensor
    best: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor


def plain_scores(case: Case, temperature: float = 1.0, with_entropy: bool = True) -> Expected:
    """Autograd through whole fp64 logits."""
    hidden, weight = (t.double().requires_grad_() for t in (case.hidden, case.weight))
    scored = case.labels >= 0
    logits = (hidden @ weight.T).transpose(0, 1) / temperature
    logprobs = logits.log_softmax(-1)
    losses = -logprobs.gather(-1, case.labels.clamp(min=0)[..., None])[..., 0] * scored
    entropy = -(logprobs.exp() * logprobs).sum(-1) * scored
    total = (losses * case.of_loss).sum()
    if with_entropy:
        total = total + (entropy * case.of_entropy).sum()
    total.backward()
    best = logits.argmax(-1).where(scored, torch.tensor(-1))
    return Expected(losses.detach(), entropy.detach(), best, hidden.grad, weight.grad)
