"""Where everything of a row lies in its picture: a pure function from a row to boxes.

The row is cut into lines of equally many tokens, so that a row of 128k stays readable. Each line has five bands:
documents (their padding in grey), views, scored positions, context-parallel owners and slices of sequence
parallelism; the last two only where there is more than one rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vl.data.draw.row import Document, DrawnRow, View
from megatron_vl.data.draw.row_text import number_lines
from megatron_vl.data.draw.shapes import Drawing, Rect, Shape, Words
from megatron_vl.plan.vision_share import CROP

STRIP = 1600  # pixels of a line
LEFT, RIGHT, TOP = 150, 20, 16
MOST_LINES, FEWEST_TOKENS = 16, 4096
BAND, GAP, BETWEEN_LINES, TEXT_LINE, LEGEND_ROW = 18, 2, 26, 18, 20


def tokens_per_line(length: int) -> int:
    """At most MOST_LINES lines, and no line shorter than FEWEST_TOKENS unless the row is."""
    lines = min(MOST_LINES, max(1, -(-length // FEWEST_TOKENS)))
    return -(-length // lines)


def bands_of(row: DrawnRow) -> list[str]:
    """The names of the bands, top down."""
    bands = ["documents", "views", "scored"]
    if row.layout.cp > 1:
        bands.append("CP rank")
    if row.layout.sp and row.layout.tp > 1:
        bands.append("TP slice")
    return bands


def lay_out_row(row: DrawnRow) -> Drawing:
    """The picture of a row: title, numbers, legend, then its lines."""
    bands = bands_of(row)
    lines = number_lines(row)
    per_line = tokens_per_line(row.length)
    count = -(-row.length // per_line)
    first = TOP + 30 + TEXT_LINE * len(lines) + LEGEND_ROW * 2 + 12
    line_height = len(bands) * (BAND + GAP) + BETWEEN_LINES
    drawing = Drawing(LEFT + STRIP + RIGHT, first + count * line_height)
    drawing.shapes.append(Words(LEFT, TOP, row.title, size=18))
    for number, text in enumerate(lines):
        drawing.shapes.append(Words(LEFT, TOP + 30 + TEXT_LINE * number, text))
    drawing.shapes += _legend(row, TOP + 30 + TEXT_LINE * len(lines) + 4)
    grid = Grid(row.length, per_line, first, line_height)
    for line in range(count):
        top = first + line * line_height
        drawing.shapes.append(Words(10, top - 16, f"token {line * per_line:,}", role="grey"))
        for band, name in enumerate(bands):
            drawing.shapes.append(Words(10, top + band * (BAND + GAP) + 2, name))
    drawing.shapes += [shape for band, name in enumerate(bands) for shape in _band(row, name, band, grid)]
    return drawing


class Grid:
    """From token numbers to pixels. first: top of the first line. line_height: from one line to the next."""

    def __init__(self, length: int, per_line: int, first: int, line_height: int):
        self.length, self.per_line = length, per_line
        self._first, self._line_height = first, line_height

    def boxes(
        self,
        begin: int,
        end: int,
        band: int,
        role: str,
        label: str = "",
        outline: bool = True,
        short: str = "",
    ) -> Iterator[Rect]:
        """The boxes of tokens begin ... end - 1 in a band: one per line that they touch, at least 1 pixel wide."""
        while begin < end:
            line, column = divmod(begin, self.per_line)
            stop = min(end, (line + 1) * self.per_line)
            left, right = self._x(column), self._x(column + stop - begin)
            top = self._first + line * self._line_height + band * (BAND + GAP)
            yield Rect(LEFT + left, top, max(1, right - left), BAND, role, label, outline, short)
            begin = stop

    def _x(self, column: int) -> int:
        return column * STRIP // self.per_line


def _band(row: DrawnRow, name: str, band: int, grid: Grid) -> Iterator[Rect]:
    if name == "documents":
        for number, document in enumerate(row.documents):
            yield from _document(document, number, band, grid)
        return
    if name in ("views", "scored"):
        yield from grid.boxes(0, row.length, band, "nothing", outline=False)
    if name == "views":
        for view in row.views:
            yield from grid.boxes(
                view.begin, view.end, band, _role(view), f"v{view.rank}", short=str(view.rank)
            )
    elif name == "scored":
        for begin, end in row.scored:
            yield from grid.boxes(begin, end, band, "scored", outline=False)
    else:
        for run in row.runs:
            rank = run.tp if name == "TP slice" else run.cp
            yield from grid.boxes(run.begin, run.end, band, f"rank{rank}", str(rank), short=str(rank))


def _document(document: Document, number: int, band: int, grid: Grid) -> Iterator[Rect]:
    end, padded = document.begin + document.length, document.begin + document.padded
    role = "document_odd" if number % 2 else "document"
    yield from grid.boxes(document.begin, end, band, role, f"{document.sample_id} ({document.length:,})")
    yield from grid.boxes(end, padded, band, "padding")


def _role(view: View) -> str:
    return "crop" if view.kind == CROP else "global"


def _legend(row: DrawnRow, top: int) -> list[Shape]:
    """What the colours mean: the row on the first line, the ranks on the second."""
    first = [
        ("document", "document"),
        ("document_odd", "the next one"),
        ("padding", "padding"),
        ("crop", "crop, v2: encoded by vision rank 2"),
        ("global", "global view"),
        ("scored", "position whose next token is learnt"),
    ]
    ranks = max(row.layout.cp, row.layout.tp if row.layout.sp else 1)
    second = [(f"rank{rank}", f"rank {rank}") for rank in range(ranks if ranks > 1 else 0)]
    shapes: list[Shape] = []
    for y, entries in ((top, first), (top + LEGEND_ROW, second)):
        x = LEFT
        for role, text in entries:
            shapes += [Rect(x, y, 14, 14, role), Words(x + 20, y - 1, text)]
            x += 40 + 7 * len(text)
    return shapes
