"""The picture of a row: boxes from tokens without pixels, owners as training has them, colours where they belong."""

from collections import Counter

import numpy as np
import pytest

from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.batch import Row, collate, empty_row, pack
from megatron_vl.data.draw.paint import paint
from megatron_vl.data.draw.row import describe_row, loads, owners, stretches, view_spans
from megatron_vl.data.draw.row_layout import LEFT, STRIP, lay_out_row, tokens_per_line
from megatron_vl.data.draw.row_text import document_lines, number_lines
from megatron_vl.data.draw.shapes import COLOURS, colour_of
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.row_work import WorkRates
from megatron_vl.plan.sequence import zigzag
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_views
from tests.data.tiny import MODEL, TOKENS

CROP_IDS = [TOKENS.patch_start, TOKENS.im_patch, TOKENS.patch_end]
GLOBAL_IDS = [TOKENS.im_start, *[TOKENS.im_patch] * 4, TOKENS.im_end]


def document(name: str, length: int, crops: int = 0, images: int = 0, scored: int = 3) -> Row:
    """Images first, then text; the last `scored` ids are learnt."""
    image = CROP_IDS * crops + GLOBAL_IDS
    ids = np.array((image * images + [7] * length)[:length], dtype=np.int64)
    labels = np.where(np.arange(length) >= length - scored, ids, -100)
    return Row(name, ids, labels, ([CROP] * crops + [GLOBAL]) * images)


def packed(layout: Layout, length: int = 128, multiple: int = 8):
    rows = [document("a", 30, crops=2, images=1), document("b", 45, images=2), document("c", 20)]
    refused = empty_row("bad", BadSample("bad", "f", 1, "missing", "no such file"))
    batch = pack([*rows, refused], length, multiple, 0)
    return describe_row(batch, 0, layout, MODEL, "a row"), batch


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(cp=2), Layout(tp=2, cp=2, sp=True), Layout(tp=4, sp=True)]
)
def test_owners_are_those_of_training(layout):
    """Every token in one run; context-parallel rank by `zigzag`; slices as a scatter of the local row makes them."""
    bounds = [0, 32, 80, 104, 128]
    runs = owners(bounds, layout)
    assert [run.begin for run in runs] == [0, *(run.end for run in runs[:-1])] and runs[-1].end == 128
    owner = {t: run for run in runs for t in range(run.begin, run.end)}
    for rank, held in enumerate(zigzag(bounds, layout.cp)):
        assert all(owner[t].cp == rank for t in held)
        per_slice = len(held) // layout.tp
        for tp in range(layout.tp if layout.sp else 0):
            assert {owner[t].tp for t in held[tp * per_slice : (tp + 1) * per_slice]} == {tp}
    assert layout.sp or {run.tp for run in runs} == {None}


def test_a_packed_row_is_described():
    layout = Layout(tp=2, cp=2, sp=True)
    row, batch = packed(layout)
    assert [(d.sample_id, d.begin, d.length, d.padded) for d in row.documents] == [
        ("a", 0, 30, 32),
        ("b", 32, 45, 48),
        ("c", 80, 20, 24),
        ("", 104, 0, 24),
    ]
    assert [(v.kind, v.begin, v.end) for v in row.views] == [
        (CROP, 0, 3),
        (CROP, 3, 6),
        (GLOBAL, 6, 12),
        (GLOBAL, 32, 38),
        (GLOBAL, 38, 44),
    ]
    shares = share_views(batch.view_kinds, 4, view_costs(MODEL))
    assert [view.rank for view in row.views] == [
        next(rank for rank, mine in enumerate(shares) if view in mine) for view in range(5)
    ]
    # shifted labels: the position before a learnt id is the one that is scored
    assert row.scored == ((26, 29), (73, 76), (96, 99)) and row.num_scored == batch.num_loss_tokens
    found = loads(row)
    assert sum(load.real for load in found) == row.tokens == 95 and sum(load.scored for load in found) == 9
    assert [load.tokens for load in found] == [64, 64] and found[0].pairs == found[1].pairs
    assert row.refused[0].reason == "missing" and sum(row.vision) == WorkRates.of(MODEL).vision(3, 2)


def test_the_numbers_are_said():
    text = "\n".join(number_lines(packed(Layout(tp=2, cp=2, sp=True))[0]))
    assert "95 of 128 tokens (74.2% full; 9 pad the documents, 24 the row), 3 documents, 9 positions" in text
    assert "3 global views, 2 crops" in text and "refused bad: missing: no such file" in text
    assert "causal pairs of the CP ranks, largest over mean: 1.000" in text and "v3: " in text
    lines = document_lines(packed(Layout())[0])
    assert [line.split()[-1] for line in lines[1:]] == ["a", "b", "c", "(nothing)"]


def test_a_dense_row_of_a_larger_micro_batch():
    """Its own views only, with the ranks that the whole micro-batch gives them; padding inside its document."""
    bad = empty_row("bad", BadSample("bad", "f", 1, "missing", "no such file"))
    rows = [document("a", 30, crops=2, images=1), bad, document("b", 45, crops=1, images=2)]
    batch = collate(rows, 64, 0)
    layout = Layout(cp=4)
    drawn = [describe_row(batch, number, layout, MODEL, "") for number in range(3)]
    assert [len(row.views) for row in drawn] == [3, 0, 4] and [len(row.refused) for row in drawn] == [0, 1, 0]
    ranks = [view.rank for row in drawn for view in row.views]
    counts = Counter(ranks)
    assert {
        rank: len(mine) for rank, mine in enumerate(share_views(batch.view_kinds, 4, view_costs(MODEL)))
    } == counts
    assert drawn[2].documents[0].length == 45 and drawn[2].documents[0].padded == 64
    assert {row.vision for row in drawn} == {drawn[0].vision}, "the work of the micro-batch, not of the row"


def test_spans_and_stretches():
    ids = np.array([1, *CROP_IDS, TOKENS.patch_newline, *GLOBAL_IDS, 2])
    assert view_spans(ids, TOKENS) == [(1, 4), (5, 11)]
    assert (
        stretches(np.array([True, False, True, True])) == [(0, 1), (2, 4)]
        and stretches(np.zeros(3, bool)) == []
    )


@pytest.mark.parametrize(
    "length, per_line", [(80, 80), (4096, 4096), (4097, 2049), (32768, 4096), (131072, 8192)]
)
def test_long_rows_are_cut_into_lines(length, per_line):
    assert tokens_per_line(length) == per_line


def test_boxes_follow_tokens():
    """128 tokens on one line of 1600 pixels: 12.5 pixels each."""
    row, _ = packed(Layout(tp=2, cp=2, sp=True))
    drawing = lay_out_row(row)
    scored = [rect for rect in drawing.rects("scored") if rect.width != 14]  # 14: the legend
    assert [(rect.x - LEFT, rect.width) for rect in scored] == [(325, 37), (912, 38), (1200, 37)]
    padding = [rect for rect in drawing.rects("padding") if rect.width != 14]
    assert [(rect.x - LEFT, rect.width) for rect in padding] == [
        (375, 25),
        (962, 38),
        (1250, 50),
        (1300, 300),
    ]
    assert max(rect.x + rect.width for role in COLOURS for rect in drawing.rects(role)) == LEFT + STRIP
    bottoms = [rect.y + rect.height for role in COLOURS for rect in drawing.rects(role)]
    assert max(bottoms) < drawing.height


def test_a_document_that_crosses_lines_has_a_box_on_each():
    rows = [document("a", 5000), document("b", 3000)]
    drawing = lay_out_row(describe_row(pack(rows, 8192, 8, 0), 0, Layout(), MODEL, ""))
    boxes = [rect for rect in drawing.rects("document") if rect.label]
    assert [(rect.x - LEFT, rect.width) for rect in boxes] == [(0, 1600), (0, 904 * 1600 // 4096)]
    assert boxes[1].y > boxes[0].y


def test_colours_stand_where_the_tokens_are():
    row, _ = packed(Layout(tp=2, cp=2, sp=True))
    drawing = lay_out_row(row)
    image = paint(drawing)
    documents, views, scored, cp, tp = (drawing.height - 26 - 100 + 20 * band + 4 for band in range(5))

    def at(token: float, y: int) -> tuple[int, int, int]:
        return image.getpixel((LEFT + int((token + 0.2) * 12.5), y))

    assert at(1, documents) == COLOURS["document"] and at(33, documents) == COLOURS["document_odd"]
    assert at(30.5, documents) == at(110, documents) == COLOURS["padding"]
    assert at(1, views) == COLOURS["crop"] and at(7, views) == COLOURS["global"]
    assert at(20, views) == COLOURS["nothing"]
    assert at(27, scored) == COLOURS["scored"] and at(29, scored) == COLOURS["nothing"]
    for run in row.runs:
        assert at(run.begin + 0.3, cp) == colour_of(f"rank{run.cp}")
        assert at(run.begin + 0.3, tp) == colour_of(f"rank{run.tp}")
    assert image.getpixel((LEFT - 1, documents)) == (255, 255, 255)
