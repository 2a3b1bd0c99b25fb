"""Trajectories as micro-batches: which go together on which rank (a pure plan), and the rows themselves.

The rows of an iteration are cut into pieces; an optimizer step of actor or critic takes one or more whole pieces.
Every data-parallel rank has the same number of micro-batches in every piece. The plan is the same on all ranks and
depends on lengths and order only.

Numbers per token (advantages and so on) stand at *target positions*, like labels: position ``t`` of a row is about
the choice of token ``t + 1``. A value behind the last token of a response is at the position of that token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.batch import MicroBatch, Row, collate, empty_row, pack
from megatron_vl.data.packing import Documents, PackRule, pack_window
from megatron_vl.data.row_plan import assign_rows
from megatron_vl.data.template import NOT_SCORED
from megatron_vl.errors import DataError
from megatron_vl.generate.request import Prompt
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.row_work import WorkRates
from megatron_vl.rl.trajectory import Trajectory


@dataclass(frozen=True)
class RowShape:
    """packed: several trajectories in one row, each padded to ``multiple`` tokens; else one per row, ``rows`` rows.

    rounds: the number of micro-batches of a piece is a multiple of this (interleaved pipelines).
    """

    seq_length: int
    packed: bool
    multiple: int = 1
    rows: int = 1
    rounds: int = 1

    @classmethod
    def of(cls, config: RunConfig, layout: Layout) -> RowShape:
        """The rows of a run: ``data.seq_length``, ``data.packing`` and ``train.micro_batch_size``."""
        packing, rounds = config.data.packing, layout.pp if layout.vpp > 1 else 1
        if packing.enabled:
            return cls(config.data.seq_length, True, packing.pad_multiple, 1, rounds)
        return cls(config.data.seq_length, False, 1, config.train.micro_batch_size, rounds)

    def padded(self, length: int) -> int:
        """Tokens that a trajectory takes."""
        return -(-length // self.multiple) * self.multiple


@dataclass(frozen=True)
class PlannedRows:
    """The trajectories of one micro-batch, by number. work: training FLOPs beside those that all rows share."""

    numbers: tuple[int, ...]
    work: int


# pieces[piece][data-parallel rank][micro-batch]
Pieces = list[list[list[PlannedRows]]]


def plan_rows(
    trajectories: Sequence[Trajectory], shape: RowShape, rates: WorkRates, pieces: int, dp_size: int
) -> Pieces:
    """Every trajectory in exactly one row; pieces, and in each the ranks, as equal in work as can be.

    Raises:
        DataError: fewer trajectories than pieces, or one that is longer than a row.
    """
    if len(trajectories) < pieces:
        raise DataError(
            f"{len(trajectories)} usable trajectories for {pieces} optimizer steps; sample more "
            "(rl.rollout), or lower rl.ppo.mini_batches and rl.critic.updates"
        )
    for trajectory in trajectories:
        if shape.padded(trajectory.num_tokens) > shape.seq_length:
            raise DataError(
                f"{trajectory.name} has {trajectory.num_tokens} tokens, more than a row of data.seq_length = "
                f"{shape.seq_length}; make rows longer, or responses shorter"
            )
    lengths = [trajectory.num_tokens for trajectory in trajectories]
    return [
        _share_out(_pack(numbers, lengths, shape, rates), shape, dp_size)
        for numbers in _cut([rates.per_token * n + rates.document(n, 0, 0) for n in lengths], pieces)
    ]


def _cut(work: Sequence[int], pieces: int) -> list[list[int]]:
    """Numbers of the trajectories of each piece: the most work first, to the piece with the least that has room."""
    found: list[list[int]] = [[] for _ in range(pieces)]
    sums, (least, more) = [0] * pieces, divmod(len(work), pieces)
    for number in sorted(range(len(work)), key=lambda n: (-work[n], n)):
        full = least + (sum(len(piece) > least for piece in found) < more)
        open_to = [p for p in range(pieces) if len(found[p]) < full]
        piece = min(open_to, key=lambda p: (sums[p], p))
        found[piece].append(number)
        sums[piece] += work[number]
    return [sorted(numbers) for numbers in found]


def _pack(
    numbers: Sequence[int], lengths: Sequence[int], shape: RowShape, rates: WorkRates
) -> list[PlannedRows]:
    """The micro-batches of a piece, by falling work."""
    work = np.array([rates.document(lengths[n], 0, 0) for n in numbers], dtype=np.int64)
    if shape.packed:
        units = np.array([shape.padded(lengths[n]) // shape.multiple for n in numbers], dtype=np.int64)
        no_views = np.zeros(len(numbers), dtype=np.int64)
        rule = PackRule(shape.seq_length // shape.multiple)
        row_of, count = pack_window(Documents(units, no_views, no_views, work), rule)
        groups = [np.flatnonzero(row_of == row).tolist() for row in range(count)]
    else:
        order = np.argsort(-work, kind="stable").tolist()
        groups = [order[i : i + shape.rows] for i in range(0, len(order), shape.rows)]
    rows = [PlannedRows(tuple(numbers[i] for i in g), sum(int(work[i]) for i in g)) for g in groups if g]
    return sorted(rows, key=lambda row: (-row.work, row.numbers))


def _share_out(rows: list[PlannedRows], shape: RowShape, dp_size: int) -> list[list[PlannedRows]]:
    """The same number of micro-batches for every rank; those that are missing are empty."""
    missing = -len(rows) % (dp_size * shape.rounds)
    return assign_rows([*rows, *[PlannedRows((), 0)] * missing], dp_size)


@dataclass(frozen=True)
class Span:
    """Where a trajectory lies: its number, row, first target position (that of the token before the response)."""

    number: int
    row: int
    first: int
    length: int

    @property
    def targets(self) -> tuple[int, slice]:
        """Index of the target positions of the response."""
        return self.row, slice(self.first, self.first + self.length)

    @property
    def behind(self) -> tuple[int, int]:
        """Index of the state behind the last token."""
        return self.row, self.first + self.length


@dataclass
class RlBatch:
    """One micro-batch. batch: without pixels. arrays: fp32 ``[b, S]`` on CPU by name, whole rows in natural order.

    features: projected features of its views in stream order ``[rows, h]``, None without views.
    """

    batch: MicroBatch
    spans: list[Span]
    features: torch.Tensor | None = None
    arrays: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def input_ids(self) -> torch.Tensor:
        """``[b, S]``."""
        return self.batch.input_ids

    def fill(self, name: str, values: Mapping[int, torch.Tensor]) -> None:
        """Put numbers per response token to their target positions, 0 elsewhere. values: by trajectory number."""
        whole = torch.zeros(self.batch.input_ids.shape, dtype=torch.float32)
        for span in self.spans:
            whole[span.targets] = values[span.number].float()
        self.arrays[name] = whole

    def tokens(self, name: str) -> dict[int, torch.Tensor]:
        """The numbers at the target positions of each trajectory, by its number."""
        return {span.number: self.arrays[name][span.targets] for span in self.spans}

    def values_behind(self, name: str) -> dict[int, torch.Tensor]:
        """The number at the last token of each trajectory, ``[]``."""
        return {span.number: self.arrays[name][span.behind] for span in self.spans}


FeaturesOf = Callable[[Prompt], torch.Tensor]


def make_batches(
    trajectories: Sequence[Trajectory],
    mine: Sequence[Sequence[PlannedRows]],
    shape: RowShape,
    padding_id: int,
    features_of: FeaturesOf | None,
) -> list[list[RlBatch]]:
    """The micro-batches of this rank, piece by piece. mine: ``[piece][micro-batch]`` of its data-parallel rank.

    features_of: projected features of a prompt's images in stream order; None where no stage of this rank has the
    embedding, or no prompt has images. The log-probabilities of the sampler are filled in.
    """
    return [
        [_make_batch(trajectories, rows.numbers, shape, padding_id, features_of) for rows in piece]
        for piece in mine
    ]


def _make_batch(
    trajectories: Sequence[Trajectory],
    numbers: Sequence[int],
    shape: RowShape,
    padding_id: int,
    features_of: FeaturesOf | None,
) -> RlBatch:
    rows = [_row(trajectories[number]) for number in numbers]
    if shape.packed:
        batch = pack(rows, shape.seq_length, shape.multiple, padding_id)
        places = [(0, start) for start in batch.cu_seqlens]
    else:
        filler = [empty_row("")] * (shape.rows - len(rows))
        batch = collate([*rows, *filler], shape.seq_length, padding_id)
        places = [(row, 0) for row in range(shape.rows)]
    spans = []
    for number, (row, start) in zip(numbers, places):
        trajectory = trajectories[number]
        spans.append(
            Span(number, row, start + len(trajectory.prompt.ids) - 1, len(trajectory.response.tokens))
        )
    made = RlBatch(batch, spans)
    shown = [trajectories[number].prompt for number in numbers if trajectories[number].prompt.view_kinds]
    if shown and features_of is not None:
        made.features = torch.cat([features_of(prompt) for prompt in shown])
    logprobs = {n: torch.tensor(trajectories[n].response.logprobs) for n in numbers}
    made.fill("sampler_logprobs", logprobs)
    return made


def _row(trajectory: Trajectory) -> Row:
    """The response is what is learnt."""
    prompt, tokens = trajectory.prompt, trajectory.response.tokens
    ids = np.array([*prompt.ids, *tokens], dtype=np.int64)
    labels = ids.copy()
    labels[: len(prompt.ids)] = NOT_SCORED
    return Row(trajectory.name, ids, labels, tuple(prompt.view_kinds))
