"""The numbers of a row, for the console and for the head of its picture."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.data.draw.row import DrawnRow, loads
from megatron_vl.plan.vision_share import CROP, GLOBAL

_MOST_RANKS, _MOST_REFUSED = 16, 4


def number_lines(row: DrawnRow) -> list[str]:
    """Tokens, views and work of the row, then what each rank has of it."""
    documents = [document for document in row.documents if document.length]
    kinds = [view.kind for view in row.views]
    between = sum(document.padded - document.length for document in documents)
    lines = [
        f"{row.tokens:,} of {row.length:,} tokens ({row.tokens / row.length:.1%} full; {between:,} pad the documents, "
        f"{row.length - row.tokens - between:,} the row), {len(documents)} documents, {row.num_scored:,} positions "
        "scored",
        f"{kinds.count(GLOBAL)} global views, {kinds.count(CROP)} crops; {row.work / 1e12:,.3g} TFLOP to train on; "
        f"layout {row.layout}",
    ]
    if row.layout.cp > 1:
        of_ranks = loads(row)
        pairs = [load.pairs for load in of_ranks]
        shown = [
            f"{rank}: {load.real:,} of {load.tokens:,} tokens, {load.scored:,} scored"
            for rank, load in enumerate(of_ranks)
        ]
        lines += _wrapped("CP ranks  ", shown)
        lines.append(f"causal pairs of the CP ranks, largest over mean: {_uneven(pairs)}")
    views = [[view.kind for view in row.views if view.rank == rank] for rank in range(row.layout.vision_size)]
    if row.views and row.layout.vision_size > 1:
        shown = [
            f"v{rank}: {mine.count(GLOBAL)} + {mine.count(CROP)}, {row.vision[rank] / 1e12:,.3g} TFLOP"
            for rank, mine in enumerate(views)
        ]
        lines += _wrapped("vision ranks (global views + crops)  ", shown)
        rule = {
            "data": "CP rank x TP + TP rank",
            "tensor": "CP rank, sharded over TP",
            "all": "(PP rank x CP + CP rank) x TP + TP rank, as if the step had no other micro-batch",
        }[row.layout.placement]
        lines.append(
            f"vision work of the micro-batch, largest over mean: {_uneven(row.vision)} (vision rank = {rule})"
        )
    lines += [f"refused {bad.id}: {bad.reason}: {bad.detail}" for bad in row.refused[:_MOST_REFUSED]]
    if len(row.refused) > _MOST_REFUSED:
        lines.append(f"... and {len(row.refused) - _MOST_REFUSED} more refused")
    return lines


def document_lines(row: DrawnRow) -> list[str]:
    """One line per document, for the console."""
    lines = [f"{'begin':>8}  {'tokens':>8}  {'padded':>8}  {'global':>6}  {'crops':>6}  sample"]
    for document in row.documents:
        end = document.begin + document.padded
        kinds = [view.kind for view in row.views if document.begin <= view.begin < end]
        name = document.sample_id or ("(nothing)" if not document.length else "")
        lines.append(
            f"{document.begin:>8}  {document.length:>8}  {document.padded:>8}  {kinds.count(GLOBAL):>6}  "
            f"{kinds.count(CROP):>6}  {name}"
        )
    return lines


def _uneven(values: Sequence[int]) -> str:
    total = sum(values)
    return f"{max(values) * len(values) / total:.3f}" if total else "nothing to do"


def _wrapped(head: str, items: Sequence[str], per_line: int = 4) -> list[str]:
    shown = list(items[:_MOST_RANKS])
    if len(items) > _MOST_RANKS:
        shown.append(f"... {len(items) - _MOST_RANKS} more")
    chunks = [shown[start : start + per_line] for start in range(0, len(shown), per_line)]
    return [(head if not number else "    ") + " | ".join(chunk) for number, chunk in enumerate(chunks)]
