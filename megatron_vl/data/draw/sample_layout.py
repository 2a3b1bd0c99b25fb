"""Where everything of a sample lies in its picture: head, views of each image in their grid, token stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from megatron_vl.data.draw.paint import text_width
from megatron_vl.data.draw.sample import DrawnImage, DrawnSample
from megatron_vl.data.draw.shapes import Drawing, Rect, Shape, Tile, Words
from megatron_vl.data.draw.stream import CROP_VIEW, GLOBAL_VIEW, NEWLINE, TEXT, Piece

WIDTH, LEFT, TOP = 1400, 20, 16
GLOBAL_SIDE, LARGEST_CROP, SMALLEST_CROP = 224, 112, 4
GRID_WIDTH, GRID_HEIGHT, CROP_GAP, MARK = 1000, 600, 4, 8
MOST_IMAGES, MOST_LINES = 12, 120
TEXT_SIZE, LINE, HEAD_LINE = 14, 22, 20

_ROLES = {CROP_VIEW: "crop", GLOBAL_VIEW: "global", NEWLINE: "newline_mark"}


def lay_out_sample(sample: DrawnSample, measure: Callable[[str, int], int] = text_width) -> Drawing:
    """The picture of a sample. measure: pixels that a text of a size takes."""
    shapes: list[Shape] = [Words(LEFT, TOP, sample.title, size=18)]
    y = TOP + 28
    for note in sample.notes:
        for line in _broken(note, measure):
            shapes.append(Words(LEFT, y, line, TEXT_SIZE, "refused"))
            y += HEAD_LINE
    if sample.pieces:
        shapes.append(Words(LEFT, y, sample.counts, TEXT_SIZE))
        y += HEAD_LINE
        shapes += _legend(y)
        y += HEAD_LINE + 8
    for number, image in enumerate(sample.images[:MOST_IMAGES]):
        y = _image(image, number, y, shapes)
    if len(sample.images) > MOST_IMAGES:
        more = len(sample.images) - MOST_IMAGES
        shapes.append(Words(LEFT, y, f"... and {more} images more", TEXT_SIZE, "grey"))
        y += HEAD_LINE + 8
    if sample.pieces:
        y = _stream(sample.pieces, y, shapes, measure)
    else:
        for line in _broken(sample.raw, measure)[:MOST_LINES]:
            shapes.append(Words(LEFT, y, line, TEXT_SIZE, "grey"))
            y += HEAD_LINE
    return Drawing(WIDTH, y + TOP, shapes)


def crop_side(rows: int, cols: int) -> int:
    """Side of one crop, so that the grid fits its room."""
    fits = min((GRID_WIDTH - MARK) // cols, GRID_HEIGHT // rows) - CROP_GAP
    return max(SMALLEST_CROP, min(LARGEST_CROP, fits))


def _legend(y: int) -> Iterator[Shape]:
    x = LEFT
    for role, text in (
        ("scored_token", "scored text"),
        ("plain_token", "text that is not scored"),
        ("special_token", "special token (green: scored)"),
        ("crop", "crop"),
        ("global", "global view"),
        ("newline_mark", "patch_newline"),
    ):
        yield Rect(x, y + 2, 14, 14, role)
        yield Words(x + 20, y + 1, text)
        x += 50 + 7 * len(text)


def _image(image: DrawnImage, number: int, y: int, shapes: list[Shape]) -> int:
    """The views of an image below its summary; returns where the next thing goes."""
    plan = image.plan
    role = "refused" if image.problem else "text"
    shapes.append(Words(LEFT, y, f"image {number}: {image.summary}", TEXT_SIZE, role))
    y += HEAD_LINE + 2
    shapes += [Rect(LEFT, y, GLOBAL_SIDE + 4, GLOBAL_SIDE + 4, "global")]
    shapes.append(Tile(LEFT + 2, y + 2, GLOBAL_SIDE, number, None))
    height = GLOBAL_SIDE + 4
    if plan.num_crops:
        side = crop_side(plan.rows, plan.cols)
        newlines = set(plan.newline_after_crops)
        left = LEFT + GLOBAL_SIDE + 40
        for crop in range(plan.num_crops):
            row, column = divmod(crop, plan.cols)
            x, top = left + column * (side + CROP_GAP), y + row * (side + CROP_GAP)
            shapes += [Rect(x, top, side + 2, side + 2, "crop"), Tile(x + 1, top + 1, side, number, crop)]
            if crop in newlines:
                shapes.append(Rect(x + side + CROP_GAP, top, MARK, side + 2, "newline_mark"))
        height = max(height, plan.rows * (side + CROP_GAP))
    return y + height + 16


def _stream(
    pieces: tuple[Piece, ...], y: int, shapes: list[Shape], measure: Callable[[str, int], int]
) -> int:
    """The pieces as running text, coloured by what they are; stops after MOST_LINES lines."""
    x, line = LEFT, 0
    for piece in pieces:
        for chunk, breaks in _chunks(piece, measure):
            width = measure(chunk, TEXT_SIZE) + 4
            if x + width > WIDTH - LEFT and x > LEFT:
                x, line = LEFT, line + 1
            if line >= MOST_LINES:
                left = pieces[-1].begin + pieces[-1].count - piece.begin
                text = f"... from here {left:,} more tokens: the text form has them"
                shapes.append(Words(LEFT, y + line * LINE, text, TEXT_SIZE, "grey"))
                return y + (line + 1) * LINE
            top = y + line * LINE
            shapes += [Rect(x, top, width, LINE - 2, _token_role(piece), outline=piece.kind != TEXT)]
            shapes += [Words(x + 2, top + 2, chunk, TEXT_SIZE)]
            x += width
            if breaks:
                x, line = LEFT, line + 1
    return y + (line + 1) * LINE


def _token_role(piece: Piece) -> str:
    if piece.kind in _ROLES:
        return _ROLES[piece.kind]
    if piece.scored:
        return "scored_token"
    return "plain_token" if piece.kind == TEXT else "special_token"


def _chunks(piece: Piece, measure: Callable[[str, int], int]) -> Iterator[tuple[str, bool]]:
    """(words, whether a new line follows): a line break is shown as \\n and breaks the line."""
    if piece.kind != TEXT:
        yield piece.text, False
        return
    lines = piece.text.split("\n")
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        words = re.findall(r"\s*\S+\s*$|\s*\S+|\s+$", line) + ([] if last else ["\\n"])
        cut = [part for word in words for part in _cut(word, measure)]
        for position, part in enumerate(cut):
            yield part, not last and position == len(cut) - 1


def _cut(word: str, measure: Callable[[str, int], int]) -> Iterator[str]:
    """A word that is wider than the picture, in pieces."""
    most = WIDTH - 2 * LEFT - 8
    while measure(word, TEXT_SIZE) > most:
        length = max(1, len(word) * most // measure(word, TEXT_SIZE) - 1)
        yield word[:length]
        word = word[length:]
    yield word


def _broken(text: str, measure: Callable[[str, int], int]) -> list[str]:
    """A text as lines that fit the picture."""
    lines = [""]
    for word in re.findall(r"\S+\s*", " ".join(text.split("\n"))):
        for part in _cut(word, measure):
            if lines[-1] and measure(lines[-1] + part, TEXT_SIZE) > WIDTH - 2 * LEFT:
                lines.append("")
            lines[-1] += part
    return lines
