"""One row as it is trained on: its documents, views and scored positions, and which rank holds what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vl.config.model import ModelConfig, SpecialTokens
from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.batch import MicroBatch
from megatron_vl.data.template import NOT_SCORED
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.row_work import WorkRates
from megatron_vl.plan.sequence import zigzag
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_views


@dataclass(frozen=True)
class Document:
    """A document in the row, in tokens: true length, and the length that it takes with its padding."""

    sample_id: str
    begin: int
    length: int
    padded: int


@dataclass(frozen=True)
class View:
    """A view, CROP or GLOBAL. begin, end: its tokens, from its start token to behind its end token.

    rank: the vision rank that encodes it.
    """

    kind: int
    begin: int
    end: int
    rank: int


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one owner. cp: context-parallel rank. tp: of a slice; None = every rank holds it."""

    begin: int
    end: int
    cp: int
    tp: int | None


@dataclass(frozen=True)
class DrawnRow:
    """A row of `length` tokens.

    scored: stretches of positions whose next token is learnt. runs: the owners, over the whole row. layout: over
    which ranks. vision: FLOPs of the tower by vision rank, over the whole micro-batch. refused: samples that have
    no place. work: training FLOPs of the row.
    """

    title: str
    length: int
    documents: tuple[Document, ...]
    views: tuple[View, ...]
    scored: tuple[tuple[int, int], ...]
    runs: tuple[Run, ...]
    layout: Layout
    vision: tuple[int, ...]
    refused: tuple[BadSample, ...]
    work: int

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(document.length for document in self.documents)

    @property
    def num_scored(self) -> int:
        return sum(end - begin for begin, end in self.scored)


@dataclass(frozen=True)
class RankLoad:
    """What one context-parallel rank has of a row.

    tokens: with padding. real: without. pairs: of tokens and earlier ones of the same document, which attention
    computes, padding included.
    """

    tokens: int
    real: int
    scored: int
    pairs: int


def describe_row(batch: MicroBatch, row: int, layout: Layout, model: ModelConfig, title: str) -> DrawnRow:
    """Row number `row` of a micro-batch (without pixels) under a layout. Raises ValueError as `zigzag`."""
    ids, labels = batch.input_ids[row].numpy(), batch.labels[row].numpy()
    bounds = batch.cu_seqlens or [0, len(ids)]
    lengths = batch.doc_lengths if batch.cu_seqlens else [batch.doc_lengths[row]]
    names = batch.sample_ids if batch.cu_seqlens else [batch.sample_ids[row]]
    documents = tuple(
        Document(name, begin, length, end - begin)
        for name, begin, end, length in zip(names, bounds[:-1], bounds[1:], lengths, strict=True)
    )
    shares, rates = share_views(batch.view_kinds, layout.vision_size, view_costs(model)), WorkRates.of(model)
    rank_of = {view: rank for rank, mine in enumerate(shares) for view in mine}
    # A packed micro-batch is one row; of a dense one only some views lie in this row.
    mine = [v for v, d in enumerate(batch.view_documents) if batch.cu_seqlens or d == row]
    spans = view_spans(ids, model.tokens)
    assert len(spans) == len(mine), (len(spans), len(mine))
    views = tuple(View(batch.view_kinds[v], begin, end, rank_of[v]) for v, (begin, end) in zip(mine, spans))
    kinds = [[batch.view_kinds[view] for view in share] for share in shares]
    work = rates.vision(sum(v.kind == GLOBAL for v in views), sum(v.kind == CROP for v in views))
    return DrawnRow(
        title,
        len(ids),
        documents,
        views,
        tuple(stretches(labels != NOT_SCORED)),
        tuple(owners(bounds, layout)),
        layout,
        tuple(rates.vision(share.count(GLOBAL), share.count(CROP)) for share in kinds),
        tuple(batch.refused if batch.cu_seqlens else _refused_in(batch, row)),
        work + sum(rates.document(d.length, 0, 0) for d in documents) + rates.per_token * len(ids),
    )


def _refused_in(batch: MicroBatch, row: int) -> list[BadSample]:
    """Why a row of a dense micro-batch is empty: its records stand in the order of the refused rows."""
    empty = [n for n, length in enumerate(batch.doc_lengths) if not length and batch.sample_ids[n]]
    return [bad for number, bad in zip(empty, batch.refused, strict=True) if number == row]


def view_spans(ids: np.ndarray, tokens: SpecialTokens) -> list[tuple[int, int]]:
    """(begin, end) of each view in the ids of a row, start and end tokens included, in stream order."""
    begins = np.flatnonzero((ids == tokens.patch_start) | (ids == tokens.im_start))
    ends = np.flatnonzero((ids == tokens.patch_end) | (ids == tokens.im_end))
    return [(int(begin), int(end) + 1) for begin, end in zip(begins, ends, strict=True)]


def stretches(chosen: np.ndarray) -> list[tuple[int, int]]:
    """(begin, end) of every run of True in a bool array."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2])]


def owners(bounds: Sequence[int], layout: Layout) -> list[Run]:
    """Who holds which tokens of a row with these document boundaries, in row order.

    Context parallelism comes first (`plan.sequence.zigzag`), then sequence parallelism cuts what a rank holds, in
    the order in which it holds it, into one slice per tensor-parallel rank. Runs end at document boundaries.
    """
    length = bounds[-1]
    cp, tp = np.zeros(length, dtype=np.int64), np.full(length, -1, dtype=np.int64)
    for rank, held in enumerate(zigzag(bounds, layout.cp)):
        cp[held] = rank
        if layout.sp:
            tp[held] = np.arange(len(held)) * layout.tp // len(held)
    change = (np.diff(cp) != 0) | (np.diff(tp) != 0)
    edges = sorted({0, length, *(np.flatnonzero(change) + 1).tolist(), *bounds})
    return [
        Run(begin, end, int(cp[begin]), int(tp[begin]) if layout.sp else None)
        for begin, end in zip(edges, edges[1:])
    ]


def loads(row: DrawnRow) -> list[RankLoad]:
    """What each context-parallel rank has of the row."""
    real, scored = np.zeros(row.length, dtype=bool), np.zeros(row.length, dtype=bool)
    earlier = np.zeros(row.length, dtype=np.int64)
    for document in row.documents:
        real[document.begin : document.begin + document.length] = True
        earlier[document.begin : document.begin + document.padded] = np.arange(1, document.padded + 1)
    for begin, end in row.scored:
        scored[begin:end] = True
    found = []
    for rank in range(row.layout.cp):
        mine = np.zeros(row.length, dtype=bool)
        for run in row.runs:
            mine[run.begin : run.end] |= run.cp == rank
        sums = (int(values[mine].sum()) for values in (real, scored, earlier))
        found.append(RankLoad(int(mine.sum()), *sums))
    return found
