"""Micro-batches of one rank after a data plan: packed rows, or dense rows of a mixture."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch.utils.data import Dataset

from megatron_vl.config.mixture import PackingConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.batch import MicroBatch, Row, collate, empty_row, pack
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.lengths import Source, checksum
from megatron_vl.data.lengths_build import length_index
from megatron_vl.data.loader import Loader, Place, Planned, with_shares
from megatron_vl.data.make_plan import plan_of_run
from megatron_vl.data.order import rows_for_step
from megatron_vl.data.plan_settings import TOO_MANY_VIEWS, PlanSettings
from megatron_vl.data.row_plan import PlannedDocument, PlannedRow, RowPlan, assign_rows
from megatron_vl.data.rows import PlannedImage, RowBuilder
from megatron_vl.data.turns import SplitRule
from megatron_vl.errors import DataError
from megatron_vl.plan.vision_share import CROP, GLOBAL

REFUSED_WHEN_INDEXED = "refused_when_indexed"


class DomainSources:
    """The sources of all domains, in the order of the plan's domains."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self._first = [0]
        for source in self.sources:
            self._first.append(self._first[-1] + len(source))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> RawLine:
        """Samples of all domains as one list."""
        domain = bisect_right(self._first, index) - 1
        return self.at(domain, index - self._first[domain])

    def at(self, domain: int, index: int) -> RawLine:
        """Sample `index` of a domain."""
        return self.sources[domain][index]

    def describe(self) -> list[dict[str, int | str]]:
        """Path, bytes and number of samples per file of all domains."""
        return [file for source in self.sources for file in source.describe()]

    def close(self) -> None:
        for source in self.sources:
            source.close()


@dataclass
class PackedMicroBatches(Dataset):
    """All micro-batches of one rank as a list: item step x M + m is number m of the M in a step.

    A packed micro-batch is one row of the plan. Which rows a step has is the plan's; which of them this rank
    takes depends on its place (`row_plan.assign_rows`). With a dense plan a micro-batch is micro_batch_size
    rows of one document.

    A sample that has become unreadable since its index was made is refused as anywhere else: its place in the
    row stays empty. One that was refused then stays so, since no place was kept for it
    (`refused_when_indexed`). One with another content, length or other views is a DataError that names it.
    """

    source: DomainSources
    plan: RowPlan
    builder: RowBuilder
    place: Place
    micro_batch_size: int = 1

    def __post_init__(self) -> None:
        settings = self.plan.settings
        assert self.builder.data.seq_length == settings.seq_length
        assert not settings.packed or self.micro_batch_size == 1, "check_packing comes first"
        sizes = [len(source) for source in self.source.sources]
        assert sizes == [domain.index.num_samples for domain in self.plan.domains], "one source per domain"

    @property
    def per_step(self) -> int:
        return self.plan.settings.global_batch_size // (self.micro_batch_size * self.place.dp_size)

    def __getitem__(self, item: int) -> MicroBatch:
        return with_shares([self.planned(item)], self.builder, self.place)[0]

    def planned(self, item: int) -> Planned:
        """A micro-batch without pixels."""
        step, micro_batch = divmod(item, self.per_step)
        rows = self._my_rows(step, micro_batch)
        if self.plan.settings.packed:
            built = [self._build(document) for row in rows for document in row.documents]
        else:
            built = [self._build(row.documents[0]) if row.documents else (empty_row(""), []) for row in rows]
        batch = self._joined([row for row, _ in built])
        # A refused document has no place in a packed row, and no image.
        images = [images for row, images in built if len(row.ids) or not self.plan.settings.packed]
        return batch, images

    def _my_rows(self, step: int, micro_batch: int) -> list[PlannedRow]:
        rows, place = self.plan.step(step), self.place
        if self.plan.settings.packed:
            return [assign_rows(rows, place.dp_size)[place.dp_rank][micro_batch]]
        mine = rows_for_step(0, len(rows), self.micro_batch_size, place.dp_rank, place.dp_size)
        return [rows[number] for number in mine[micro_batch]]

    def _joined(self, rows: list[Row]) -> MicroBatch:
        settings, model = self.plan.settings, self.builder.model
        padding_id, sizes = model.tokens.endoftext, (model.vision.image_size, model.vision.crop_size)
        if settings.packed:
            return pack(rows, settings.seq_length, settings.pad_multiple, padding_id, *sizes)
        return collate(rows, settings.seq_length, padding_id, *sizes)

    def _build(self, planned: PlannedDocument) -> tuple[Row, list[PlannedImage]]:
        """A document's row and images, checked against its length index."""
        sample, piece = self.plan.domains[planned.domain].index.part(planned.index)
        raw = self.source.at(planned.domain, sample)
        row, images = self.builder.build(raw, piece)
        if row.refused is not None:
            return row, images
        name = self.plan.settings.domains[planned.domain].name
        contents = self.plan.domains[planned.domain].index.contents
        if contents is not None and contents[sample] != checksum(raw):
            raise DataError(
                f"sample {row.sample_id} ({raw.source}:{raw.line}) of domain {name} is not what it was when the length "
                "index was made; restore it, or remove the index and begin a new run"
            )
        found = (len(row.ids), row.view_kinds.count(GLOBAL), row.view_kinds.count(CROP))
        if planned.refused == TOO_MANY_VIEWS:
            settings = self.plan.settings
            detail = (
                f"{found[1]} global views and {found[2]} crops; a row may have at most "
                f"{_limit(settings.max_globals)} and {_limit(settings.max_crops)}"
            )
            return _refused(row, raw, TOO_MANY_VIEWS, detail)
        if planned.refused:
            detail = f"it was refused as {planned.refused} when the length index was made, and has no place"
            return _refused(row, raw, REFUSED_WHEN_INDEXED, detail)
        if found != (planned.tokens, planned.num_globals, planned.num_crops):
            if row.left_out:  # as with any other sample, an image that cannot be read any more ends no run
                return _refused(
                    row, raw, row.left_out[0], "an image that its length index has cannot be used"
                )
            raise DataError(
                f"sample {row.sample_id} ({raw.source}:{raw.line}) of domain {name} has {found[0]} tokens, "
                f"{found[1]} global views and {found[2]} crops, but {planned.tokens}, {planned.num_globals} "
                f"and {planned.num_crops} in its length index: it or its images have changed since; restore "
                "them, or remove the index and begin a new run"
            )
        return row, images


def open_plan(
    settings: PlanSettings,
    sources: Sequence[Source],
    data: DataConfig,
    packing: PackingConfig,
    model: ModelConfig,
    folder: str | os.PathLike,
    num_steps: int,
    first: bool,
    say: Callable[[str], None],
    readings: Sequence[str] | None = None,
) -> RowPlan:
    """The plan of a run from its settings and sources (one per domain); indices and plan are kept on disk.

    folder: of the run; indices go to packing.index_dir where it is given. first: one process of the run, which
    builds what is missing while the others wait for it. readings: per source how it reads its files. Errors:
    as `length_index` and `make_plan`.
    """
    index_dir = packing.index_dir or Path(folder) / "data_index"
    indices = [
        length_index(
            index_dir,
            domain.name,
            source,
            data,
            model,
            packing.index_workers,
            first,
            say,
            reading,
            split=SplitRule.of(packing, data.seq_length),
        )
        for domain, source, reading in zip(
            settings.domains, sources, readings or [""] * len(sources), strict=True
        )
    ]
    return plan_of_run(Path(folder) / "data_plan", settings, indices, num_steps, say, save=first)


def packed_loader(
    micro_batches: PackedMicroBatches, start_step: int = 0, timeout_seconds: float = 600
) -> Loader:
    """Loader over all steps of the plan."""
    return Loader(micro_batches, start_step, micro_batches.plan.num_steps, timeout_seconds)


def order_description(plan: RowPlan) -> str:
    """What decides which documents step k trains on, for `checkpoint.progress.Progress.data`.

    Two plans with the same text give every step the same rows, in any layout, as far as both reach.
    """
    settings = plan.settings
    domains = ", ".join(
        f"{domain.index.name} ({domain.index.num_samples} samples)" for domain in plan.domains
    )
    kind = "packed" if settings.packed else "dense"
    return (
        f"{domains} with seed {settings.seed}, {settings.global_batch_size} {kind} rows of "
        f"{settings.seq_length} tokens a step, data plan {plan.digest[:16]}"
    )


def _refused(row: Row, raw: RawLine, reason: str, detail: str) -> tuple[Row, list[PlannedImage]]:
    record = BadSample(row.sample_id, raw.source, raw.line, reason, detail)
    return replace(empty_row(row.sample_id), refused=record), []


def _limit(value: int | None) -> str:
    return "any number" if value is None else str(value)
