"""The picture of a sample: pieces of its ids, views in their grid, what is said of a refused one."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.draw.paint import paint
from megatron_vl.data.draw.sample import Views, describe_sample, sample_lines
from megatron_vl.data.draw.sample_layout import MOST_IMAGES, crop_side, lay_out_sample
from megatron_vl.data.draw.shapes import COLOURS, Rect, Tile, Words
from megatron_vl.data.draw.stream import token_pieces
from megatron_vl.data.tokenizer import load_tokenizer
from tests.data.tiny import MODEL, TOKENS, chat, make_data, raw


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("draw")
    data = make_data(folder, seq_length=120)
    grid = Image.new("RGB", (220, 160))
    for number in range(12):
        column, row = number % 4, number // 4
        grid.paste(
            (20 * number, 10 * number, 255 - 20 * number),
            (55 * column, 54 * row, 55 * column + 55, 54 * row + 54),
        )
    grid.save(folder / "grid.png")
    return RunConfig(model=MODEL, data=data)


def described(config, *images, answer="red", question="What colour?"):
    return describe_sample(raw(chat(question, answer, *images)), "vqa", config)


def test_pieces_cover_every_id_once_and_spell_them(config):
    sample, _ = described(config, "wide.png", answer="is <think>3</think>")
    begins = [piece.begin for piece in sample.pieces]
    ends = [piece.begin + piece.count for piece in sample.pieces]
    assert begins == [0, *ends[:-1]]
    kinds = [piece.kind for piece in sample.pieces]
    assert kinds[:7] == ["special", "text", "crop", "crop", "crop", "global", "text"]
    texts = [piece.text for piece in sample.pieces]
    assert texts[2] == "<patch_start><im_patch><patch_end>" and texts[5] == "<im_start><im_patch>x4<im_end>"
    scored = [piece.text for piece in sample.pieces if piece.scored]
    assert "".join(scored) == "is <think>3</think><|im_end|>"


def test_the_first_id_is_never_scored(config):
    tokenizer = load_tokenizer(config.data.tokenizer, TOKENS, MODEL.text.vocab_size)
    ids = np.array(tokenizer.encode("how red is it, circle"))
    pieces = token_pieces(ids, ids.copy(), TOKENS, tokenizer)
    assert [(piece.begin, piece.scored) for piece in pieces] == [(0, False), (1, True)]
    labels = np.where(np.arange(len(ids)) == 2, ids, -100)
    cut = token_pieces(ids, labels, TOKENS, tokenizer)
    assert [(p.begin, p.count, p.scored) for p in cut] == [
        (0, 2, False),
        (2, 1, True),
        (3, len(ids) - 3, False),
    ]


def test_the_grid_of_an_image_with_its_newlines(config):
    sample, planned = described(config, "grid.png")
    plan = sample.images[0].plan
    assert (plan.rows, plan.cols) == (3, 4)
    drawing = lay_out_sample(sample)
    tiles = [shape for shape in drawing.shapes if isinstance(shape, Tile)]
    assert [tile.crop for tile in tiles] == [None, *range(12)]
    crops = tiles[1:]
    assert len({tile.y for tile in crops}) == 3 and [t.x for t in crops[:4]] == [t.x for t in crops[4:8]]
    marks = [r for r in drawing.rects("newline_mark") if r.height == crops[0].side + 2]
    assert len(marks) == 2 and [m.y + 1 for m in marks] == [crops[3].y, crops[7].y], (
        "none behind the last row"
    )
    assert all(mark.x > max(tile.x for tile in crops) for mark in marks)
    image = paint(drawing, Views(planned, config))
    for number, tile in enumerate(crops):
        wanted = np.array((20 * number, 10 * number, 255 - 20 * number))
        found = np.array(image.getpixel((tile.x + tile.side // 2, tile.y + tile.side // 2)))
        assert np.abs(found - wanted).max() <= 3, number
    assert image.getpixel((marks[0].x + 3, marks[0].y + 9)) == COLOURS["newline_mark"]


def test_scored_text_is_green_and_the_rest_is_not(config):
    sample, _ = described(config, question="What", answer="red")
    drawing = lay_out_sample(sample)
    image = paint(drawing)
    words = {shape.text: shape for shape in drawing.shapes if isinstance(shape, Words) and shape.size == 14}
    assert image.getpixel((words["red"].x - 1, words["red"].y)) == COLOURS["scored_token"]
    assert image.getpixel((words["What"].x - 1, words["What"].y)) == COLOURS["plain_token"]
    boxes = [shape for shape in drawing.shapes if isinstance(shape, Rect)]
    assert max(box.x + box.width for box in boxes) <= drawing.width


def test_refused_samples_say_why(config):
    missing, planned = described(config, "none.png")
    assert not planned and missing.refused.reason == "missing"
    assert sample_lines(missing)[1].startswith("REFUSED missing: there is no 'none.png'")
    assert "none.png" in sample_lines(missing)[-1], "the record as it stands"
    drawing = lay_out_sample(missing)
    assert any(isinstance(s, Words) and s.role == "refused" for s in drawing.shapes)
    cut, planned = described(config, "cut.jpg")
    assert cut.refused.reason == "truncated" and cut.images[0].problem and cut.pieces, (
        "found when decoded only"
    )
    paint(lay_out_sample(cut), Views(planned, config))
    long, _ = described(config, question="again " * 200)
    assert long.refused.reason == "too_long" and sum(piece.count for piece in long.pieces) > 120


def test_very_many_of_anything_stay_readable(config):
    unlimited = replace(config, data=replace(config.data, seq_length=1 << 20))
    sample, _ = described(unlimited, *["small.png"] * 400, question="word " * 30000 + "x" * 5000)
    drawing = lay_out_sample(sample)
    assert sum(isinstance(shape, Tile) for shape in drawing.shapes) == MOST_IMAGES and drawing.height < 12000
    assert any(isinstance(s, Words) and s.text == "... and 388 images more" for s in drawing.shapes)
    assert any(
        isinstance(s, Words) and "more tokens: the text form has them" in s.text for s in drawing.shapes
    )
    assert crop_side(1, 336) == 4 and crop_side(2, 4) == 112


def test_counts(config):
    sample, _ = described(config, "wide.png", "small.png")
    tokens = sum(piece.count for piece in sample.pieces)
    assert sample.counts.startswith(f"{tokens} tokens") and sample.counts.endswith("2 images with 3 crops")
    assert sample.images[0].summary.startswith(
        "wide.png  160x60, resized 160x60, canvas 168x56 cut by 56 into 1 x 3"
    )
