"""Finding what is to be drawn: a row of a step, or a sample of a domain, through the code that training reads with."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.batch import MicroBatch
from megatron_vl.data.draw.row import DrawnRow, describe_row
from megatron_vl.data.jsonl import JsonlSource, RawLine
from megatron_vl.data.lengths import Source
from megatron_vl.data.lengths_build import index_builder
from megatron_vl.data.loader import MicroBatches, Place
from megatron_vl.data.order import SampleOrder, rows_for_step
from megatron_vl.data.packed import DomainSources, PackedMicroBatches
from megatron_vl.data.plan_settings import training_domains
from megatron_vl.data.row_plan import PlannedRow, assign_rows
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.training import files_folder, is_planned, open_domain, open_domains, plan_of
from megatron_vl.data.turns import WHOLE, Piece, SplitRule
from megatron_vl.errors import DataError
from megatron_vl.plan.budget import total_steps
from megatron_vl.plan.layout import Layout

Say = Callable[[str], None]


def find_row(config: RunConfig, layout: Layout, step: int, row: int, say: Say) -> DrawnRow:
    """Row number `row` (from 0) of a step (from 0) of a checked run.

    The rows of a step are numbered over all data-parallel ranks: packed ones by falling work, as the plan has them,
    dense ones in the order of the data. Indexes and plan of a run that has not begun are made, and kept where the
    run looks for them. Raises DataError for a row that is not there, and as a run would.
    """
    steps = total_steps(config)
    size = config.train.global_batch_size
    if steps is None or not 0 <= step < steps or not 0 <= row < size:
        raise DataError(
            f"step {step}, row {row}: the run has steps 0 to {(steps or 0) - 1} of rows 0 to {size - 1}; give "
            "one of them, or train.train_steps where the run has no length"
        )
    rows = RowBuilder(config.data, config.model)
    if not is_planned(config.data):
        batch, within, rank = _plain(config, layout, rows, step, row)
    else:
        batch, within, rank = _planned(config, layout, rows, step, row, steps, say)
    title = f"step {step}, row {row} of {size}: data-parallel rank {rank}"
    return describe_row(batch, within, layout, config.model, title)


def _plain(
    config: RunConfig, layout: Layout, rows: RowBuilder, step: int, row: int
) -> tuple[MicroBatch, int, int]:
    """Rows of `data.train` without a plan: the micro-batch, the row's number in it, its data-parallel rank."""
    train, source = config.train, JsonlSource(config.data.train)
    try:
        rank, micro_batch, within = dense_place(
            row, train.global_batch_size, train.micro_batch_size, layout.dp
        )
        order = SampleOrder(len(source), config.data.seed)
        place = Place(rank, layout.dp, None)
        batches = MicroBatches(source, order, rows, place, train.micro_batch_size, train.global_batch_size)
        return batches[step * batches.per_step + micro_batch], within, rank
    finally:
        source.close()


def _planned(
    config: RunConfig, layout: Layout, rows: RowBuilder, step: int, row: int, steps: int, say: Say
) -> tuple[MicroBatch, int, int]:
    """The same after a data plan, packed or dense."""
    sources = open_domains(config, say)
    try:
        plan = plan_of(config, sources, steps, True, say)
        train = config.train
        if plan.settings.packed:
            rank, micro_batch = packed_place(plan.step(step), row, layout.dp)
            within = 0
        else:
            rank, micro_batch, within = dense_place(
                row, train.global_batch_size, train.micro_batch_size, layout.dp
            )
        place = Place(rank, layout.dp, None)
        batches = PackedMicroBatches(DomainSources(sources), plan, rows, place, train.micro_batch_size)
        return batches[step * batches.per_step + micro_batch], within, rank
    finally:
        for source in sources:
            source.close()


def dense_place(row: int, global_batch_size: int, micro_batch_size: int, dp: int) -> tuple[int, int, int]:
    """(data-parallel rank, micro-batch, number within it) of a row of a step."""
    for rank in range(dp):
        for number, mine in enumerate(rows_for_step(0, global_batch_size, micro_batch_size, rank, dp)):
            if row in mine:
                return rank, number, mine.index(row)
    raise AssertionError(f"row {row} of {global_batch_size}")


def packed_place(rows: list[PlannedRow], row: int, dp: int) -> tuple[int, int]:
    """(data-parallel rank, micro-batch) of a row of a step. By identity: rows may be equal."""
    for rank, mine in enumerate(assign_rows(rows, dp)):
        for number, planned in enumerate(mine):
            if planned is rows[row]:
                return rank, number
    raise AssertionError(f"row {row} of {len(rows)}")


def find_sample(
    config: RunConfig, domain: str | None, index: int | None, sample_id: str | None, say: Say
) -> tuple[RawLine, Piece, str]:
    """Sample number `index` (from 0), or the first of that id, of a domain (None = the first); and the domain's name.

    Where the run cuts conversations, an id may be that of a piece (`id#1`); otherwise the piece is the whole sample.
    An id is searched by reading the domain from its beginning. Nothing is written: indexes of files are used where
    the run has made them. Raises DataError when there is no such sample.
    """
    domains = training_domains(config.data.train, config.data.domains)
    chosen = next((one for one in domains if domain in (None, one.name)), None)
    if chosen is None:
        names = ", ".join(one.name for one in domains)
        raise DataError(f"domain {domain}: the run has {names}; give one of them")
    folder = files_folder(config)
    source = open_domain(chosen, config, str(folder) if folder.is_dir() else None, say)
    try:
        raw, piece = _sample_of(source, chosen.name, index, sample_id, config)
        return raw, piece, chosen.name
    finally:
        source.close()


def _sample_of(
    source: Source, domain: str, index: int | None, sample_id: str | None, config: RunConfig
) -> tuple[RawLine, Piece]:
    if sample_id is None:
        index = index or 0
        if not 0 <= index < len(source):
            raise DataError(
                f"sample {index}: domain {domain} has {len(source)} samples, counted from 0; give one of them"
            )
        return source[index], WHOLE
    whole_id, _, piece_number = sample_id.rpartition("#")
    cut_one = None
    for number in range(len(source)):
        raw = source[number]
        found = _id_of(raw)
        if found == sample_id:
            return raw, WHOLE
        if cut_one is None and whole_id and found == whole_id:
            cut_one = raw
    rule = SplitRule.of(config.data.packing, config.data.seq_length)
    if cut_one is not None and rule is not None:
        for piece in index_builder(config.data, config.model).pieces(cut_one, rule):
            if str(piece.number) == piece_number and piece != WHOLE:
                return cut_one, piece
    raise DataError(
        f"sample {sample_id}: none of the {len(source)} samples of domain {domain} has this id; check its spelling"
    )


def _id_of(raw: RawLine) -> str:
    try:
        return raw.parse().id
    except SampleRefused as refusal:
        return refusal.sample_id or raw.default_id
