"""Which feature row goes from whom to whom: the encoding ranks' rows to the ranks that hold their positions.

A pure function of views, positions and layout, so that every rank knows all counts and no sizes are exchanged. A
feature row has exactly one position. Two roles:

* who encodes: in placements ``data`` and ``all`` one rank per share of the views, in ``tensor`` the TP ranks of a CP
  rank, each of which ends with equal copies of all rows;
* who owns a position: the CP rank whose zigzag slice it is in; with sequence parallelism one of its TP ranks, without
  it all of them, which hold equal copies and get equal gradients. In placement ``all`` these are ranks of the first
  pipeline stage; the others encode and own nothing.

Ranks are numbered within the group that exchanges, pp x (CP x TP) + cp x TP + tp: the first stage's, in placement
``all`` those of the whole replica.

Where the giver has copies, a receiver takes them from the one with its own tensor-parallel rank; so nothing is sent
or added up twice, in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vl.plan.layout import Layout
from megatron_vl.plan.vision_share import CROP, GLOBAL


@dataclass(frozen=True)
class ExchangePlan:
    """One rank's part. Arrays are int64, counts are rows per rank of the group that exchanges.

    send: rows of its own features in the order in which they leave. send_counts, receive_counts: how many go to, and
    come from, each rank. slot_rows, slot_positions: batch row and local position of each feature received.
    give_back: received rows whose gradient leaves, in that order. give_counts, get_counts: as above. returned: its
    own feature row that each gradient row which comes back belongs to.
    """

    send: np.ndarray
    send_counts: list[int]
    receive_counts: list[int]
    slot_rows: np.ndarray
    slot_positions: np.ndarray
    give_back: np.ndarray
    give_counts: list[int]
    get_counts: list[int]
    returned: np.ndarray


def plan_exchange(
    kinds: Sequence[int],
    shares: Sequence[Sequence[int]],
    tokens: tuple[int, int],
    slots: tuple[np.ndarray, np.ndarray],
    bounds: Sequence[int],
    layout: Layout,
    rank: int,
) -> ExchangePlan:
    """The part of ``rank`` of the group.

    kinds: of all views of the micro-batch; shares: of ``share_step`` over ``layout.vision_size`` ranks. tokens:
    feature rows of one crop and of one global view. slots: batch row and position of every feature in stream order.
    bounds: padded document boundaries of a row, ``[0, S]`` when dense.
    """
    encoder, local_row = encoders(kinds, shares, tokens)
    assert len(encoder) == len(slots[0]), "as many slots as features: fusion.image_slots comes first"
    owner, local_position = owners(slots[1], bounds, layout)
    encodes, owns = _roles(layout)

    mine = np.flatnonzero(encoder == encodes[rank])
    mine = mine[np.argsort(owner[mine], kind="stable")]  # by owner, in stream order
    send, send_counts = _to_each(owner[mine], owns, _from_me(encodes, layout, rank))
    get_counts = _counts(owner[mine], owns, _to_me(owns, layout, rank))

    held = np.flatnonzero(owner == owns[rank])
    held = held[np.argsort(encoder[held], kind="stable")]  # as they arrive: by encoder, in stream order
    receive_counts = _counts(encoder[held], encodes, _to_me(encodes, layout, rank))
    give_back, give_counts = _to_each(encoder[held], encodes, _from_me(owns, layout, rank))
    return ExchangePlan(
        send=local_row[mine][send],
        send_counts=send_counts,
        receive_counts=receive_counts,
        slot_rows=slots[0][held],
        slot_positions=local_position[held],
        give_back=give_back,
        give_counts=give_counts,
        get_counts=get_counts,
        returned=local_row[mine],
    )


def encoders(
    kinds: Sequence[int], shares: Sequence[Sequence[int]], tokens: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Per feature row in stream order: which share encodes it, and its row among the features of that share."""
    assert (CROP, GLOBAL) == (0, 1), "kinds index the pair of token counts"
    rows = np.asarray(tokens, dtype=np.int64)[np.asarray(kinds, dtype=np.int64)]
    share_of_view, first_row = np.zeros_like(rows), np.zeros_like(rows)
    for share, views in enumerate(shares):
        index = np.asarray(views, dtype=np.int64)
        share_of_view[index] = share
        first_row[index] = np.cumsum(rows[index]) - rows[index]
    in_stream = np.cumsum(rows) - rows
    return np.repeat(share_of_view, rows), np.arange(rows.sum()) + np.repeat(first_row - in_stream, rows)


def owners(positions: np.ndarray, bounds: Sequence[int], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Per position of a row: which owner holds it, and where in the owner's slice (`plan.sequence.zigzag`).

    Owners are numbered cp x TP + tp with sequence parallelism, otherwise cp.
    """
    edges, local = np.asarray(bounds, dtype=np.int64), positions
    cp = np.zeros_like(positions)
    if layout.cp > 1:
        pieces = 2 * layout.cp
        lengths = np.diff(edges) // pieces
        firsts = (edges[:-1, None] + lengths[:, None] * np.arange(pieces)).reshape(-1)
        piece = np.arange(len(firsts)) % pieces
        second = piece >= layout.cp  # the second of the two chunks that a rank holds of a document
        holder = np.where(second, pieces - 1 - piece, piece)
        shift = np.repeat(edges[:-1] // layout.cp, pieces) + np.repeat(lengths, pieces) * second - firsts
        chunk = np.searchsorted(firsts, positions, side="right") - 1
        cp, local = holder[chunk], positions + shift[chunk]
    if not layout.sp:
        return cp, local
    length = edges[-1] // (layout.cp * layout.tp)
    tp = local // length
    return cp * layout.tp + tp, local - tp * length


def held_rows(
    positions: np.ndarray, bounds: Sequence[int], layout: Layout, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of positions in the order of the stream: the numbers of those that ``rank`` = cp x TP + tp holds, and where."""
    owner, local = owners(positions, bounds, layout)
    held = np.flatnonzero(owner == _roles(layout)[1][rank])
    return held, local[held]


def _roles(layout: Layout) -> tuple[list[int], list[int]]:
    """Per rank of the group: which share it encodes, and as which owner it holds positions.

    Ranks behind the first stage are the owner behind the last one, which no position has.
    """
    first_stage = range(layout.cp * layout.tp)
    cp = [rank // layout.tp for rank in first_stage]
    owns = list(first_stage) if layout.sp else cp
    if layout.placement == "tensor":
        return cp, owns
    behind = layout.vision_size - len(first_stage)
    return list(range(layout.vision_size)), owns + [max(owns) + 1] * behind


def _from_me(giver: list[int], layout: Layout, rank: int) -> list[bool]:
    """Which ranks take from ``rank`` what it gives: all, or those with its tensor-parallel rank if it has copies."""
    copies = giver.count(giver[rank]) > 1
    return [not copies or other % layout.tp == rank % layout.tp for other in range(len(giver))]


def _to_me(giver: list[int], layout: Layout, rank: int) -> list[bool]:
    """From which ranks ``rank`` takes."""
    return [_from_me(giver, layout, other)[rank] for other in range(len(giver))]


def _counts(units: np.ndarray, unit_of_rank: list[int], taking: list[bool]) -> list[int]:
    """Rows that come from each rank: ``units`` are those of the rows that are wanted."""
    sizes = np.bincount(units, minlength=max(unit_of_rank) + 1)
    return [int(sizes[unit]) if take else 0 for unit, take in zip(unit_of_rank, taking)]


def _to_each(units: np.ndarray, unit_of_rank: list[int], taking: list[bool]) -> tuple[np.ndarray, list[int]]:
    """Rows (sorted by unit) in the order in which they leave, and how many go to each rank."""
    ends = np.cumsum(np.bincount(units, minlength=max(unit_of_rank) + 1))
    counts = _counts(units, unit_of_rank, taking)
    pieces = [np.arange(ends[unit] - count, ends[unit]) for unit, count in zip(unit_of_rank, counts)]
    return np.concatenate(pieces), counts
