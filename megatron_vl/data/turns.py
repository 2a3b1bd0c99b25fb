"""Cutting a conversation that is longer than a row between its turns, by rule, so that each piece stands alone.

A *turn pair* begins with a user turn that follows an answer and goes on to the next such turn. Whole turn pairs are
joined from the beginning, as many as a row takes; a piece holds the text and the images of its own turns and nothing
else, apart from system turns at the very beginning, which every piece repeats. A single turn pair that no row takes
becomes a piece of its own, which the limits of a row then refuse. A document without turns is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_vl.config.mixture import PackingConfig
from megatron_vl.data.sample import ImagePart, Message, Sample


@dataclass(frozen=True)
class SplitRule:
    """What a row takes: tokens, and its global views and crops (None = any number)."""

    tokens: int
    max_globals: int | None = None
    max_crops: int | None = None

    @classmethod
    def of(cls, packing: PackingConfig, seq_length: int) -> SplitRule | None:
        """The rule of a run, None when over-long conversations are refused."""
        if not packing.enabled or packing.overlong != "split_turns":
            return None
        return cls(seq_length, packing.max_global_views, packing.max_crops)

    def takes(self, cost: np.ndarray) -> bool:
        """Whether a row has room for [tokens, global views, crops]."""
        limits = (self.tokens, self.max_globals, self.max_crops)
        return all(limit is None or value <= limit for value, limit in zip(cost.tolist(), limits))


@dataclass(frozen=True)
class Piece:
    """Part of a sample: the messages first ... end - 1. number: from 1, 0 = the whole sample (first, end unused)."""

    number: int = 0
    first: int = 0
    end: int = -1

    def of(self, sample: Sample) -> Sample:
        """The part of a conversation, called ``id#number``, behind its leading system turns."""
        if not self.number:
            return sample
        system = sample.messages[: leading_system(sample.messages)]
        return replace(
            sample, id=self.name(sample.id), messages=(*system, *sample.messages[self.first : self.end])
        )

    def name(self, sample_id: str) -> str:
        """The id of the part."""
        return f"{sample_id}#{self.number}" if self.number else sample_id


WHOLE = Piece()


def leading_system(messages: Sequence[Message]) -> int:
    """Number of system turns before the first other one."""
    return next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))


def turn_pairs(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """(first message, end) of each turn pair, without the leading system turns; together they are all the rest."""
    begin = leading_system(messages)
    starts = [begin] + [
        n
        for n in range(begin + 1, len(messages))
        if messages[n].role == "user" and messages[n - 1].role == "assistant"
    ]
    return list(zip(starts, [*starts[1:], len(messages)])) if begin < len(messages) else []


def cut(messages: Sequence[Message], costs: np.ndarray, rule: SplitRule) -> list[Piece]:
    """The pieces of a conversation, [WHOLE] when a row takes all of it or it has a single turn pair.

    costs: int64 [messages, 3], tokens, global views and crops of each message.
    """
    pairs = turn_pairs(messages)
    if len(pairs) < 2 or rule.takes(costs.sum(axis=0)):
        return [WHOLE]
    system = costs[: leading_system(messages)].sum(axis=0)
    stretches: list[tuple[int, int]] = []
    for first, end in pairs:
        begin = stretches[-1][0] if stretches else first
        if stretches and rule.takes(system + costs[begin:end].sum(axis=0)):
            stretches[-1] = (begin, end)
        else:
            stretches.append((first, end))
    return [Piece(number, *stretch) for number, stretch in enumerate(stretches, start=1)]


def images_per_message(sample: Sample) -> list[int]:
    """How many images each turn of a conversation has."""
    return [sum(isinstance(part, ImagePart) for part in message.parts) for message in sample.messages]
