"""Best-fit packing of the documents of one window into rows: a pure function, the same on every rank.

A window is a stretch of the global order (`data/mixture.py`), so packing needs nothing from what comes
before. Lengths are counted in units of `pad_multiple` tokens. The result does not depend on the parallel
layout.

Two aims: few rows, and rows of equal work. Long documents are placed by best fit, since they decide how many
rows there must be. Then documents that bring more work than tokens (images, long attention) are spread, the
largest first, each to the row with the least work so far. The light rest fills the rows by best fit.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

LARGE_SHARE = 4  # documents of more than a quarter of a row are placed first
MORE_ROWS_FOR_BALANCE = 0.01


@dataclass(frozen=True)
class PackRule:
    """What a row holds. row_units: its length in units. max_globals, max_crops: its views, None = no limit.

    balance: spread the work; False = plain best-fit decreasing.
    """

    row_units: int
    max_globals: int | None = None
    max_crops: int | None = None
    balance: bool = True


@dataclass(frozen=True)
class Documents:
    """The documents of one window in global order, int64 [n] each.

    units: padded length; 0 = takes no place (refused). globals_, crops: its views. work: FLOPs that it brings
    (`plan.row_work.WorkRates.document`).
    """

    units: np.ndarray
    globals_: np.ndarray
    crops: np.ndarray
    work: np.ndarray

    def __len__(self) -> int:
        return len(self.units)

    def first(self, count: int) -> Documents:
        """The first `count` of them."""
        return Documents(self.units[:count], self.globals_[:count], self.crops[:count], self.work[:count])


def pack_window(documents: Documents, rule: PackRule) -> tuple[np.ndarray, int]:
    """Row of each document, int32 [n], -1 for those without tokens; and the number of rows.

    No document is cut; every row keeps all limits of the rule. Each document must fit a row of its own
    (asserted): refusing the others comes before.
    """
    units = documents.units
    assert len(units) == 0 or int(units.max()) <= rule.row_units, "a document is longer than a row"
    for views, limit in ((documents.globals_, rule.max_globals), (documents.crops, rule.max_crops)):
        assert limit is None or len(views) == 0 or int(views.max()) <= limit, "more views than a row may have"
    if not rule.balance:
        return _best_fit_decreasing(documents, rule)
    row_of, num_rows = _balanced(documents, rule)
    least = least_rows(documents, rule)
    if num_rows <= least + 1 or num_rows <= least * (1 + MORE_ROWS_FOR_BALANCE):
        return row_of, num_rows
    plain, num_plain = _best_fit_decreasing(documents, rule)
    saves = num_rows - num_plain > max(1, MORE_ROWS_FOR_BALANCE * num_plain)
    return (plain, num_plain) if saves else (row_of, num_rows)


def least_rows(documents: Documents, rule: PackRule) -> int:
    """Lower bound on the number of rows: the sums against the limits."""
    sums = [(documents.units, rule.row_units), (documents.globals_, rule.max_globals)]
    sums += [(documents.crops, rule.max_crops)]
    return max(-(-int(values.sum()) // limit) for values, limit in sums if limit is not None)


def _best_fit_decreasing(documents: Documents, rule: PackRule) -> tuple[np.ndarray, int]:
    rows = _Rows(documents, rule)
    for number in _descending(documents.units, documents.units > 0):
        rows.best_fit(number)
    return rows.row_of, len(rows.room)


def _balanced(documents: Documents, rule: PackRule) -> tuple[np.ndarray, int]:
    units, work = documents.units, documents.work
    placed = units > 0
    large = units * LARGE_SHARE > rule.row_units
    # Exact sums: those of floating-point arrays depend on the processor.
    total_units, total_work = max(int(units.sum()), 1), sum(work.tolist())
    # More work per unit than the window has on average. With equal work per unit everywhere, none is heavy.
    heavy = placed & ~large & (work > units * (total_work / total_units))
    rows = _Rows(documents, rule)
    for number in _descending(units, large):
        rows.best_fit(number)
    rows.open_up_to(least_rows(documents, rule))
    rows.spread(_descending(work, heavy))
    for number in _descending(units, placed & ~large & ~heavy):
        rows.best_fit(number)
    return rows.row_of, len(rows.room)


def _descending(values: np.ndarray, chosen: np.ndarray) -> list[int]:
    """Numbers of the chosen documents by falling value, ties in global order."""
    numbers = np.flatnonzero(chosen)
    return numbers[np.argsort(-values[numbers], kind="stable")].tolist()


class _Rows:
    """Rows that are being filled. room: units left, per row. row_of: row per document, -1 = not placed.

    Rows of equal room form a list in `_with_room`, and bit r of `_rooms` says that the list of r is not
    empty: the tightest row for a document is then the lowest set bit from its length on.
    """

    def __init__(self, documents: Documents, rule: PackRule):
        self.rule = rule
        self.row_of = np.full(len(documents), -1, dtype=np.int32)
        self.room: list[int] = []
        self.work: list[int] = []
        self._globals: list[int] = []
        self._crops: list[int] = []
        self._needs = [
            values.tolist()
            for values in (documents.units, documents.globals_, documents.crops, documents.work)
        ]
        self._limited = rule.max_globals is not None or rule.max_crops is not None
        self._most_globals = (
            rule.max_globals if rule.max_globals is not None else int(documents.globals_.sum())
        )
        self._most_crops = rule.max_crops if rule.max_crops is not None else int(documents.crops.sum())
        self._with_room: dict[int, list[int]] = {}
        self._rooms = 0

    def open_up_to(self, count: int) -> None:
        """Opens empty rows until there are `count`."""
        while len(self.room) < count:
            self._open()

    def best_fit(self, number: int) -> None:
        """Puts a document into the row that it fills most, or into a new one."""
        units = self._needs[0][number]
        room, rest = units, self._rooms >> units
        while rest:
            skip = (rest & -rest).bit_length() - 1
            room += skip
            for row in self._with_room[room]:
                if not self._limited or self._views_fit(row, number):
                    self._put(number, row)
                    return
            room, rest = room + 1, rest >> (skip + 1)
        self._put(number, self._open())

    def spread(self, numbers: list[int]) -> None:
        """Puts each document into the row with the least work that can take it, or into a new one."""
        heap = [(work, row) for row, work in enumerate(self.work)]
        heapq.heapify(heap)
        shortest = min((self._needs[0][number] for number in numbers), default=0)
        for number in numbers:
            passed_over = []
            row = -1
            while heap and row < 0:
                entry = heapq.heappop(heap)
                if self._takes(entry[1], number):
                    row = entry[1]
                elif self.room[entry[1]] >= shortest:
                    passed_over.append(entry)
            if row < 0:
                row = self._open()
            self._put(number, row)
            for entry in (*passed_over, (self.work[row], row)):
                heapq.heappush(heap, entry)

    def _takes(self, row: int, number: int) -> bool:
        return self.room[row] >= self._needs[0][number] and (
            not self._limited or self._views_fit(row, number)
        )

    def _views_fit(self, row: int, number: int) -> bool:
        return (
            self._globals[row] + self._needs[1][number] <= self._most_globals
            and self._crops[row] + self._needs[2][number] <= self._most_crops
        )

    def _open(self) -> int:
        row = len(self.room)
        self.room.append(self.rule.row_units)
        self.work.append(0)
        self._globals.append(0)
        self._crops.append(0)
        self._file(row)
        return row

    def _put(self, number: int, row: int) -> None:
        units, globals_, crops, work = (values[number] for values in self._needs)
        room = self.room[row]
        same = self._with_room[room]
        same.remove(row)
        if not same:
            self._rooms &= ~(1 << room)
        self.row_of[number] = row
        self.room[row] = room - units
        self.work[row] += work
        self._globals[row] += globals_
        self._crops[row] += crops
        self._file(row)

    def _file(self, row: int) -> None:
        room = self.room[row]
        self._with_room.setdefault(room, []).append(row)
        self._rooms |= 1 << room
