"""Which rows attend to which: the variable-length attention calls of one context-parallel rank, without a mask.

A document is cut into ``2 * cp`` chunks and rank r holds chunks r and ``2 * cp - 1 - r`` (plan/sequence.py). Two chunks
see each other wholly, along the diagonal or not at all, so every call is full, or causal aligned at the last key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Range = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """Sequence i: query rows ``queries[i]`` against key rows ``keys[i]``, one behind the other in both lists.

    causal: the last query of a sequence sees all its keys, the one before all but the last, and so on. Otherwise every
    query sees every key of its sequence.
    """

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]
    causal: bool

    @property
    def cu_queries(self) -> tuple[int, ...]:
        """Edges of the sequences among the queries taken together: ``(0, ..., total)``."""
        return edges(self.queries)

    @property
    def cu_keys(self) -> tuple[int, ...]:
        """The same among the keys."""
        return edges(self.keys)

    @property
    def longest_query(self) -> int:
        return max(end - start for start, end in self.queries)

    @property
    def longest_key(self) -> int:
        return max(end - start for start, end in self.keys)

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are computed."""
        total = 0
        for (a, b), (c, d) in zip(self.queries, self.keys):
            hidden = (b - a) * (b - a - 1) // 2 if self.causal else 0
            total += (b - a) * (d - c) - hidden
        return total


def edges(ranges: Sequence[Range]) -> tuple[int, ...]:
    """Running total of the lengths, from 0."""
    return (0, *accumulate(end - start for start, end in ranges))


def documents(bounds: Sequence[int]) -> list[Range]:
    """(first row, row behind the last) of every document that has rows. bounds: ``(0, ..., S)``."""
    return [(start, end) for start, end in zip(bounds, bounds[1:]) if end > start]


def whole_call(bounds: Sequence[int], causal: bool) -> Call:
    """Without context parallelism: every document against itself."""
    found = tuple(documents(bounds))
    return Call(found, found, causal)


def gathered_calls(bounds: Sequence[int], cp: int, rank: int) -> tuple[Call, Call]:
    """Causal attention when a rank has the keys of the whole row: its early chunks, then its late ones.

    Queries are rows of the rank, keys rows of the row. The keys of a chunk are its document up to its own end; those of
    two chunks of a document overlap, hence two calls.
    """
    early: list[tuple[Range, Range]] = []
    late: list[tuple[Range, Range]] = []
    for start, end in documents(bounds):
        size, first = (end - start) // (2 * cp), start // cp
        early.append(((first, first + size), (start, start + (rank + 1) * size)))
        late.append(((first + size, first + 2 * size), (start, start + (2 * cp - rank) * size)))
    return _call(early, causal=True), _call(late, causal=True)


def ring_call(bounds: Sequence[int], cp: int, rank: int, source: int) -> Call:
    """Causal attention of ``rank`` against the keys that ``source`` holds; rows are those of the two ranks.

    Its own: the two chunks of a document are causal as they lie. Of a rank before it: all queries see the early chunk
    only. Of a rank behind it: the late queries see both chunks, the early ones none.
    """
    pairs: list[tuple[Range, Range]] = []
    for start, end in documents(bounds):
        size, first = (end - start) // (2 * cp), start // cp
        both, early, late = (first, first + 2 * size), (first, first + size), (first + size, first + 2 * size)
        if source == rank:
            pairs.append((both, both))
        elif source < rank:
            pairs.append((both, early))
        else:
            pairs.append((late, both))
    return _call(pairs, causal=source == rank)


def _call(pairs: Sequence[tuple[Range, Range]], causal: bool) -> Call:
    return Call(tuple(q for q, _ in pairs), tuple(k for _, k in pairs), causal)
