"""The global order of the documents of several domains, so that every stretch of it has the wanted shares.

A document's place is its **due time**: the tokens of its domain before it in the phase, divided by the
domain's share. Sorting by due time serves, at every moment, the domain that is furthest behind its share
(least served first; ties to the earlier domain), so each prefix is within one document of each domain's share.

Time is cut into windows of equal length. The documents of window w are those that are due in it: one stretch
of each domain's stream, found from the cumulated tokens of that domain. So a window is a function of the
lengths, the seed, the shares and w, and of nothing that was read before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vl.config.mixture import DomainConfig, MixturePhase
from megatron_vl.data.streams import DomainStream, sample_indices
from megatron_vl.errors import DataError
from megatron_vl.plan.mixture import asks_of, in_epochs, weighted_shares

Positions = tuple[int, ...]


@dataclass(frozen=True)
class Stretch:
    """Documents of all domains in global order. domains, indices, tokens: int64 [n]; index within a domain."""

    domains: np.ndarray
    indices: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.domains)


@dataclass(frozen=True)
class PhaseOrder:
    """One phase of the run over the domains' streams.

    shares: of the tokens, sum 1. begin: position of each stream at its start. begin_tokens: tokens of each
    stream before it. end, total_tokens: where its epochs end, and the tokens from begin to end; None = it goes
    on until its rows are full.
    """

    shares: tuple[float, ...]
    begin: Positions
    begin_tokens: Positions
    end: Positions | None = None
    total_tokens: int | None = None

    def window_begin(self, streams: Sequence[DomainStream | None], time: int) -> Positions:
        """Where each stream stands at a due time in tokens of all domains: where a window begins there."""
        if self.total_tokens is not None and time >= self.total_tokens:
            assert self.end is not None
            return self.end
        positions = []
        for number, (stream, share) in enumerate(zip(streams, self.shares)):
            position = self.begin[number]
            if stream is not None and share > 0:
                due = self.begin_tokens[number] + int(time * share)
                position = max(position, stream.position_of(due))
                if self.end is not None:
                    position = min(position, self.end[number])
            positions.append(position)
        return tuple(positions)


def start_phase(
    domains: Sequence[DomainConfig],
    phase: MixturePhase,
    streams: Sequence[DomainStream | None],
    positions: Positions,
) -> PhaseOrder:
    """The order of a phase that begins at these positions of the streams.

    Weights continue each domain's stream. Epochs begin it anew at its next epoch, so that whole epochs hold
    each document exactly once.
    """
    asks = asks_of(domains, phase)
    if not in_epochs(asks):
        shares = weighted_shares(domains, asks, phase.text_share)
        return PhaseOrder(tuple(shares), positions, _tokens_before(streams, positions))
    begin, end = [], []
    for stream, ask, position in zip(streams, asks, positions):
        if stream is None or not ask.epochs:
            begin.append(position)
            end.append(position)
            continue
        first = -(-position // len(stream)) * len(stream)
        begin.append(first)
        whole, part = int(ask.epochs), ask.epochs - int(ask.epochs)
        last = first + whole * len(stream)
        if part:
            last = stream.position_of(stream.tokens_before(last) + int(part * stream.tokens_per_epoch))
        end.append(last)
    before, after = _tokens_before(streams, begin), _tokens_before(streams, end)
    amounts = [b - a for a, b in zip(before, after)]
    total = sum(amounts)
    if total == 0:
        raise DataError(
            f"epochs = {[ask.epochs for ask in asks]} are so few that no document is seen; give more of them"
        )
    shares = tuple(amount / total for amount in amounts)
    return PhaseOrder(shares, tuple(begin), before, tuple(end), total)


def _tokens_before(streams: Sequence[DomainStream | None], positions: Sequence[int]) -> Positions:
    return tuple(
        0 if stream is None else stream.tokens_before(position)
        for stream, position in zip(streams, positions)
    )


def documents_between(
    streams: Sequence[DomainStream | None],
    order: PhaseOrder,
    begin: Positions,
    begin_tokens: Positions,
    end: Positions,
) -> Stretch:
    """The documents between two places of a phase in global order.

    begin_tokens: tokens of each stream before `begin`; known from the plan, so that no epoch is summed here.
    """
    domains, indices, tokens, due = [], [], [], []
    for number, stream in enumerate(streams):
        if stream is None or end[number] <= begin[number]:
            continue
        positions = np.arange(begin[number], end[number], dtype=np.int64)
        index = sample_indices(stream.order, positions)
        length = stream.tokens[index].astype(np.int64)
        before = np.cumsum(length) - length + (begin_tokens[number] - order.begin_tokens[number])
        domains.append(np.full(len(positions), number, dtype=np.int64))
        indices.append(index)
        tokens.append(length)
        due.append(before / order.shares[number])
    if not domains:
        empty = np.empty(0, dtype=np.int64)
        return Stretch(empty, empty, empty)
    by_due_time = np.argsort(np.concatenate(due), kind="stable")
    return Stretch(
        np.concatenate(domains)[by_due_time],
        np.concatenate(indices)[by_due_time],
        np.concatenate(tokens)[by_due_time],
    )
