"""What each domain gets in each phase of a mixture, from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.config.mixture import DomainConfig, MixturePhase


@dataclass(frozen=True)
class Ask:
    """What one domain is to get in one phase: a weight or epochs, both None = nothing."""

    weight: float | None
    epochs: float | None


def asks_of(domains: Sequence[DomainConfig], phase: MixturePhase) -> list[Ask]:
    """One per domain: what the phase says where it names domains, else what the domains say themselves."""
    if not phase.domains:
        return [Ask(domain.weight, domain.epochs) for domain in domains]
    named = {share.name: Ask(share.weight, share.epochs) for share in phase.domains}
    return [named.get(domain.name, Ask(None, None)) for domain in domains]


def weighted_shares(
    domains: Sequence[DomainConfig], asks: Sequence[Ask], text_share: float | None
) -> list[float]:
    """Shares of the tokens from weights, sum 1.

    With text_share the text domains share it out by their weights, and the multimodal ones the rest. The rules
    of `plan.mixture_checks` are presumed: every side that gets a share has a weight above 0.
    """
    weights = [ask.weight or 0.0 for ask in asks]
    if text_share is None:
        total = math.fsum(weights)  # sum() rounds differently from Python 3.12 on, and the order hangs on it
        return [weight / total for weight in weights]
    sides = {"text": text_share, "multimodal": 1.0 - text_share}
    sums = {side: math.fsum(w for w, d in zip(weights, domains) if d.modality == side) for side in sides}
    return [
        sides[domain.modality] * weight / sums[domain.modality] if weight and sides[domain.modality] else 0.0
        for weight, domain in zip(weights, domains)
    ]


def in_epochs(asks: Sequence[Ask]) -> bool:
    """Whether the domains of a phase are given in epochs."""
    return any(ask.epochs is not None for ask in asks)


def phase_steps(phase: MixturePhase, row_tokens_per_step: int) -> int | None:
    """Steps of a phase of given length, the last one rounded up; None when no length is given."""
    return None if phase.tokens is None else -(-phase.tokens // row_tokens_per_step)
