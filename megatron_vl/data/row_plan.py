"""The exact plan of a run's data: which documents are in which row of which step, for every step.

A plan is made ahead (`data/make_plan.py`) from the length indices, the mixture and the rules of packing, and
from nothing else: not from the parallel layout, nor from what was trained before. It keeps a few numbers per
window (which stretch of each domain's stream it holds, how many rows came before), so that any step can be
looked up at once; the rows themselves are packed again where they are needed, which takes some milliseconds
per window. Resuming takes only the number of the next step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np

from megatron_vl.data.mixture import PhaseOrder, Stretch, documents_between
from megatron_vl.data.order import SampleOrder
from megatron_vl.data.packing import Documents, pack_window
from megatron_vl.data.plan_settings import Domain, PlanSettings
from megatron_vl.errors import DataError

WINDOWS_KEPT = 4


@dataclass(frozen=True)
class PlannedDocument:
    """One document: entry `index` of the length index of domain number `domain`, as the length index knows it.

    tokens: 0 when it is refused; then `refused` says why ("" = a good one).
    """

    domain: int
    index: int
    tokens: int
    num_globals: int
    num_crops: int
    refused: str = ""


@dataclass(frozen=True)
class PlannedRow:
    """One row. work: training FLOPs without those that all rows share; vision_work: of its views alone."""

    documents: tuple[PlannedDocument, ...]
    work: int
    vision_work: int

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(document.tokens for document in self.documents)


@dataclass(frozen=True)
class Windows:
    """What is kept of each of W windows, int64. D domains.

    first_row: [W + 1], rows before each window. phase: [W]. begin, end: [W, D], its stretch of each stream.
    tokens_before: [W, D], tokens of each stream before `begin`. documents, tokens: [W, D], good documents in
    it and their tokens. contents: [W, 3], padded tokens, global views, crops.
    """

    first_row: np.ndarray
    phase: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    tokens_before: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray
    contents: np.ndarray


@dataclass
class RowPlan:
    """The plan. orders: one per phase that is begun. digest: `PlanSettings.digest` of the indices."""

    settings: PlanSettings
    domains: list[Domain]
    digest: str
    orders: list[PhaseOrder]
    windows: Windows
    num_steps: int
    _made: OrderedDict[int, list[PlannedRow]] = field(default_factory=OrderedDict, repr=False)

    def step(self, step: int) -> list[PlannedRow]:
        """The rows of one step: alike for every layout. Packed rows: those with the most work first.

        Raises DataError behind the last step of the plan.
        """
        if not 0 <= step < self.num_steps:
            raise DataError(
                f"step {step} is not in the plan of {self.num_steps} steps; make data.mixture longer, or "
                "train.train_steps shorter"
            )
        size = self.settings.global_batch_size
        rows = self.rows(step * size, (step + 1) * size)
        if self.settings.packed:
            rows.sort(key=lambda row: -row.work)
        return rows

    def rows(self, first: int, last: int) -> list[PlannedRow]:
        """The rows first ... last - 1 of the run."""
        result: list[PlannedRow] = []
        first_row = self.windows.first_row
        window = int(np.searchsorted(first_row, first, side="right")) - 1
        while len(result) < last - first:
            begin = int(first_row[window])
            result += self.window_rows(window)[max(first - begin, 0) : last - begin]
            window += 1
        return result

    def window_rows(self, window: int) -> list[PlannedRow]:
        """All rows of a window in the order in which they are trained on."""
        if window not in self._made:
            while len(self._made) >= WINDOWS_KEPT:
                self._made.popitem(last=False)
            self._made[window] = self._make_rows(window)
        return self._made[window]

    def _make_rows(self, window: int) -> list[PlannedRow]:
        windows, settings = self.windows, self.settings
        streams = [domain.stream for domain in self.domains]
        begin, end, before = (
            tuple(array[window].tolist()) for array in (windows.begin, windows.end, windows.tokens_before)
        )
        order = self.orders[int(windows.phase[window])]
        stretch = documents_between(streams, order, begin, before, end)
        documents = documents_of(stretch, self.domains, settings)
        row_of, num_packed = rows_of(documents, settings)
        num_rows = int(windows.first_row[window + 1] - windows.first_row[window])
        assert num_packed <= num_rows, f"window {window}: {num_packed} rows, planned {num_rows}"
        rows: list[list[PlannedDocument]] = [[] for _ in range(num_rows)]
        columns = (stretch.domains, stretch.indices, stretch.tokens, documents.globals_, documents.crops)
        for row, *column in zip(row_of.tolist(), *(values.tolist() for values in columns)):
            document = PlannedDocument(*column)
            if not document.tokens:
                reason = self.domains[document.domain].reason(document.index)
                document = replace(document, refused=reason)
            rows[row].append(document)
        if settings.packed:  # the packer's order would put all long documents into one step
            shuffled = SampleOrder(num_rows, settings.seed ^ (window << 20))
            rows = [rows[shuffled.index(number)] for number in range(num_rows)]
        return [self._row(row) for row in rows]

    def _row(self, documents: list[PlannedDocument]) -> PlannedRow:
        rates = self.settings.rates
        return PlannedRow(
            tuple(documents),
            sum(rates.document(d.tokens, d.num_globals, d.num_crops) for d in documents),
            sum(rates.vision(d.num_globals, d.num_crops) for d in documents),
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_made": OrderedDict()}


def documents_of(stretch: Stretch, domains: Sequence[Domain], settings: PlanSettings) -> Documents:
    """The documents of a stretch as packing sees them: refused ones have neither length nor views."""
    globals_ = np.zeros(len(stretch), dtype=np.int64)
    crops = np.zeros(len(stretch), dtype=np.int64)
    for number, domain in enumerate(domains):
        mine = np.flatnonzero((stretch.domains == number) & (stretch.tokens > 0))
        if len(mine):
            globals_[mine] = domain.index.globals_[stretch.indices[mine]]
            crops[mine] = domain.index.crops[stretch.indices[mine]]
    rates = settings.rates
    work = globals_ * rates.per_global + crops * rates.per_crop
    work += stretch.tokens * stretch.tokens * rates.per_token_squared
    return Documents(settings.units(stretch.tokens), globals_, crops, work)


def rows_of(documents: Documents, settings: PlanSettings) -> tuple[np.ndarray, int]:
    """Row of each document and the number of rows. Refused documents go with the rows, to be reported there.

    Dense rows hold one document each, a refused one too.
    """
    count = len(documents)
    if not settings.packed:
        return np.arange(count, dtype=np.int32), count
    row_of, num_rows = pack_window(documents, settings.rule)
    num_rows = max(num_rows, int(count > 0))
    refused = np.flatnonzero(row_of < 0)
    row_of[refused] = refused * num_rows // max(count, 1)
    return row_of, num_rows


class HasWork(Protocol):
    """A row, or what else is shared out. work: training FLOPs."""

    @property
    def work(self) -> int: ...


RowT = TypeVar("RowT", bound=HasWork)


def assign_rows(rows: Sequence[RowT], dp_size: int) -> list[list[RowT]]:
    """Shares the rows of a step out: result[rank] holds the row of each micro-batch of a data-parallel rank.

    rows: by falling work, so that the dp_size rows of one micro-batch are near in work. Among them the rank
    with the least so far takes the one with the most, so that the ranks' sums over the step are near as well.
    """
    assert len(rows) % dp_size == 0, (len(rows), dp_size)
    shares: list[list[RowT]] = [[] for _ in range(dp_size)]
    work = [0] * dp_size
    for start in range(0, len(rows), dp_size):
        ranks = sorted(range(dp_size), key=lambda rank: (work[rank], rank))
        for rank, row in zip(ranks, rows[start : start + dp_size]):
            shares[rank].append(row)
            work[rank] += row.work
    return shares


@dataclass(frozen=True)
class Balance:
    """How evenly a step's work lies on the data-parallel ranks: largest over mean, 1 = evenly.

    vision: of the tower's work alone (1 when there is none). total: with attention and the linear work.
    """

    vision: float
    total: float


def balance_of(shares: Sequence[Sequence[PlannedRow]], settings: PlanSettings) -> Balance:
    """The balance of one step, as `assign_rows` has shared it out."""
    linear = settings.rates.per_token * settings.seq_length
    vision = [sum(row.vision_work for row in rows) for rows in shares]
    total = [sum(row.work + linear for row in rows) for rows in shares]
    return Balance(*(max(v) * len(v) / sum(v) if sum(v) else 1.0 for v in (vision, total)))
