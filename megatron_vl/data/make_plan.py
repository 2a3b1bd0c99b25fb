"""Making the plan of a run's data, window by window, and keeping it on disk."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from megatron_vl.config.mixture import MixturePhase
from megatron_vl.data.lengths import LengthIndex
from megatron_vl.data.mixture import PhaseOrder, Positions, Stretch, documents_between, start_phase
from megatron_vl.data.packing import Documents
from megatron_vl.data.plan_report import check_epochs
from megatron_vl.data.plan_settings import Domain, PlanSettings
from megatron_vl.data.row_plan import RowPlan, Windows, documents_of, rows_of
from megatron_vl.data.whole_file import write_whole
from megatron_vl.errors import DataError, raise_if_any
from megatron_vl.plan.mixture import asks_of, in_epochs, phase_steps
from megatron_vl.plan.mixture_checks import check_mixture

SECONDS_BETWEEN_LINES = 10.0


def make_plan(
    settings: PlanSettings,
    indices: Sequence[LengthIndex],
    num_steps: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> RowPlan:
    """The plan for `num_steps` steps; None = as many as phases of fixed length or epochs make.

    indices: one per domain. Raises ConfigErrors for an impossible mixture; DataError for an empty domain, for
    text domains with images, when the phases do not reach num_steps, and for a domain that would be repeated
    more often than its max_epochs.
    """
    domains = open_domains(settings, indices)
    maker = _Maker(settings, domains, say)
    size = settings.global_batch_size
    limit = None if num_steps is None else num_steps * size
    most: int | None = None
    for number, phase in enumerate(settings.phases):
        if limit is not None and maker.num_rows >= limit:
            break
        steps = phase_steps(phase, size * settings.seq_length)
        goal = None if steps is None else maker.num_rows + steps * size
        if number < len(settings.phases) - 1 or in_epochs(asks_of(settings.domains, phase)):
            maker.add_phase(phase, goal, limit)
            continue
        # The last phase goes on to the end of the run and has rows to spare, so that it can be made longer.
        ends = [rows for rows in (goal, limit) if rows is not None]
        if not ends:
            raise DataError(
                "data.mixture: the plan has no end; give the last phase tokens, or the run train_steps"
            )
        most = min(ends)
        maker.add_phase(phase, None, most)
    steps = (maker.num_rows if most is None else most) // size
    _check_reach(steps, num_steps)
    plan = maker.plan(settings.digest(indices), steps if num_steps is None else num_steps)
    check_epochs(plan)
    return plan


def _check_reach(steps: int, num_steps: int | None) -> None:
    if num_steps is not None and steps < num_steps:
        raise DataError(
            f"the phases of data.mixture make {steps} steps, the run has {num_steps}; make the last phase "
            f"longer, or set train.train_steps {steps}"
        )


def open_domains(settings: PlanSettings, indices: Sequence[LengthIndex]) -> list[Domain]:
    """The domains under the limits of a row, checked. Errors: as `make_plan`."""
    raise_if_any(check_mixture(settings.domains, settings.phases))
    assert [d.name for d in settings.domains] == [index.name for index in indices], "one index per domain"
    for domain, index in zip(settings.domains, indices):
        with_images = int(np.count_nonzero(index.globals_))
        if domain.modality == "text" and with_images:
            raise DataError(
                f"domain {domain.name} is of modality text, but {with_images} of its {len(index)} samples "
                "have images, and its tokens would count as text; set its modality to multimodal, or take "
                "them out"
            )
    asks = [asks_of(settings.domains, phase) for phase in settings.phases]
    return [
        Domain.of(index, settings, used=any(phase[n].weight or phase[n].epochs for phase in asks))
        for n, index in enumerate(indices)
    ]


@dataclass
class _Maker:
    """A plan as it grows. columns: per window, the fields of `Windows` but `first_row`."""

    settings: PlanSettings
    domains: list[Domain]
    say: Callable[[str], None]
    orders: list[PhaseOrder] = field(default_factory=list)
    first_row: list[int] = field(default_factory=lambda: [0])
    columns: dict[str, list] = field(default_factory=dict)
    here: Positions = ()

    def __post_init__(self) -> None:
        self.streams = [domain.stream for domain in self.domains]
        self.here = (0,) * len(self.domains)
        self.columns = {column.name: [] for column in fields(Windows) if column.name != "first_row"}
        self._said = time.monotonic()

    @property
    def num_rows(self) -> int:
        return self.first_row[-1]

    def add_phase(self, phase: MixturePhase, goal: int | None, limit: int | None) -> None:
        """Adds windows until the plan has `limit` rows or the phase is over.

        A phase is over when the plan has `goal` rows in all, exactly (the last window ends where the last row
        is full), or when its epochs are (rows without documents fill the last step). Nothing of the windows
        depends on `limit`, so that a longer plan begins with the shorter one.
        """
        order = start_phase(self.settings.domains, phase, self.streams, self.here)
        self.orders.append(order)
        self.here = order.begin
        window = 0
        while (goal is None or self.num_rows < goal) and (limit is None or self.num_rows < limit):
            window += 1
            end = order.window_begin(self.streams, window * self.settings.window_tokens)
            stretch, documents = self._documents(order, end)
            rows = rows_of(documents, self.settings)[1]
            if goal is not None and self.num_rows + rows > goal:
                rows = goal - self.num_rows
                stretch, documents, end = self._cut(stretch, documents, rows)
            if end != self.here:  # else no document is due in this window
                self._add(stretch, documents, end, rows)
            if order.end is not None and end == order.end:
                size = self.settings.global_batch_size
                self.first_row[-1] = -(-self.first_row[-1] // size) * size
                break

    def plan(self, digest: str, num_steps: int) -> RowPlan:
        """What has been made."""
        arrays = {name: np.array(column, dtype=np.int64) for name, column in self.columns.items()}
        windows = Windows(first_row=np.array(self.first_row, dtype=np.int64), **arrays)
        return RowPlan(self.settings, self.domains, digest, self.orders, windows, num_steps)

    def _documents(self, order: PhaseOrder, end: Positions) -> tuple[Stretch, Documents]:
        before = self._tokens_before(self.here)
        stretch = documents_between(self.streams, order, self.here, before, end)
        return stretch, documents_of(stretch, self.domains, self.settings)

    def _add(self, stretch: Stretch, documents: Documents, end: Positions, rows: int) -> None:
        count = len(self.domains)
        mine = [(stretch.domains == number) & (stretch.tokens > 0) for number in range(count)]
        record = {
            "phase": len(self.orders) - 1,
            "begin": self.here,
            "end": end,
            "tokens_before": self._tokens_before(self.here),
            "documents": [int(chosen.sum()) for chosen in mine],
            "tokens": [int(stretch.tokens[chosen].sum()) for chosen in mine],
            "contents": [
                int(documents.units.sum()) * self.settings.pad_multiple,
                int(documents.globals_.sum()),
                int(documents.crops.sum()),
            ],
        }
        for name, value in record.items():
            self.columns[name].append(value)
        self.first_row.append(self.num_rows + rows)
        self.here = end
        if time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.say(f"plan of the data: {self.num_rows:,} rows, {len(self.first_row) - 1:,} windows")

    def _cut(self, stretch: Stretch, documents: Documents, rows: int) -> tuple[Stretch, Documents, Positions]:
        """The longest beginning of a window that makes at most `rows` rows, by bisection, and where it ends.

        Where one document more needs two rows more, a row without documents takes the last place.
        """
        enough, too_many = 0, len(documents)
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if rows_of(documents.first(middle), self.settings)[1] <= rows:
                enough = middle
            else:
                too_many = middle
        stretch = Stretch(stretch.domains[:enough], stretch.indices[:enough], stretch.tokens[:enough])
        taken = np.bincount(stretch.domains, minlength=len(self.domains))
        end = tuple(here + int(count) for here, count in zip(self.here, taken))
        return stretch, documents.first(enough), end

    def _tokens_before(self, positions: Positions) -> Positions:
        return tuple(
            0 if stream is None else stream.tokens_before(position)
            for stream, position in zip(self.streams, positions)
        )


def plan_file(folder: str | os.PathLike, settings: PlanSettings, indices: Sequence[LengthIndex]) -> Path:
    """Where the plan of these settings and data is kept below `folder`."""
    return Path(folder) / f"plan-{settings.digest(indices)[:16]}.npz"


def save_plan(plan: RowPlan, path: Path) -> None:
    """Writes a plan; a reader finds it complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {"digest": plan.digest, "orders": [asdict(order) for order in plan.orders]}
    write_whole(path, lambda file: np.savez(file, note=np.array(json.dumps(note)), **asdict(plan.windows)))


def load_plan(
    path: Path, settings: PlanSettings, indices: Sequence[LengthIndex], num_steps: int
) -> RowPlan | None:
    """A plan that was saved for these settings and data, None when there is none of num_steps steps or more.

    Raises DataError for a damaged file, and as `make_plan`.
    """
    domains = open_domains(settings, indices)
    fixed = [
        phase_steps(phase, settings.global_batch_size * settings.seq_length) for phase in settings.phases
    ]
    if None not in fixed:
        _check_reach(sum(fixed), num_steps)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            note = json.loads(str(stored["note"]))
            windows = Windows(**{column.name: stored[column.name] for column in fields(Windows)})
        digest = str(note["digest"])
        orders = [
            PhaseOrder(**{name: value if value is None else tuple(value) for name, value in order.items()})
            for order in note["orders"]
        ]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}); remove it to have the plan made anew") from error
    if digest != settings.digest(indices):
        raise DataError(f"{path} belongs to other data or settings; remove it to have the plan made anew")
    if int(windows.first_row[-1]) < num_steps * settings.global_batch_size:
        return None
    plan = RowPlan(settings, domains, digest, orders, windows, num_steps)
    check_epochs(plan)
    return plan


def plan_of_run(
    folder: str | os.PathLike,
    settings: PlanSettings,
    indices: Sequence[LengthIndex],
    num_steps: int,
    say: Callable[[str], None] = lambda line: None,
    save: bool = True,
) -> RowPlan:
    """The saved plan, or one made now. Every rank may call it, since all make the same; one of them saves."""
    path = plan_file(folder, settings, indices)
    plan = load_plan(path, settings, indices, num_steps)
    if plan is None:
        plan = make_plan(settings, indices, num_steps, say)
        if save:
            save_plan(plan, path)
    return plan
