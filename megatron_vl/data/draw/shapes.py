"""A picture as a list of shapes: what a layout function returns, and what `paint` turns into pixels."""

from __future__ import annotations

from dataclasses import dataclass, field

Colour = tuple[int, int, int]

BACKGROUND: Colour = (255, 255, 255)
INK: Colour = (30, 30, 30)
COLOURS: dict[str, Colour] = {
    "document": (190, 208, 232),
    "document_odd": (151, 181, 219),  # neighbours differ
    "padding": (233, 233, 233),
    "crop": (246, 196, 120),
    "global": (224, 122, 47),
    "scored": (58, 160, 86),
    "nothing": (248, 248, 248),
    "text": INK,
    "grey": (120, 120, 120),
    "refused": (200, 30, 40),
    "plain_token": (240, 240, 240),
    "scored_token": (190, 230, 200),
    "special_token": (205, 215, 250),
    "newline_mark": (214, 39, 110),
}
# Neighbouring ranks of the same axis must be told apart; more ranks than colours begin again, with their number.
_RANKS: tuple[Colour, ...] = (
    (102, 166, 214),
    (250, 200, 90),
    (128, 196, 140),
    (232, 130, 130),
    (170, 150, 214),
    (150, 120, 100),
    (240, 160, 200),
    (100, 190, 190),
)


def colour_of(role: str) -> Colour:
    """The colour of a role: one of COLOURS, or `rank3` for rank 3 of an axis."""
    if role.startswith("rank"):
        return _RANKS[int(role.removeprefix("rank")) % len(_RANKS)]
    return COLOURS[role]


@dataclass(frozen=True)
class Rect:
    """A filled box in pixels. outline: draw its border. label: written inside when there is room, else `short`."""

    x: int
    y: int
    width: int
    height: int
    role: str
    label: str = ""
    outline: bool = True
    short: str = ""


@dataclass(frozen=True)
class Words:
    """A line of text; x, y: its top left corner."""

    x: int
    y: int
    text: str
    size: int = 13
    role: str = "text"


@dataclass(frozen=True)
class Tile:
    """Where a view is shown. image: number of the image of the sample. crop: number of the crop, None = global."""

    x: int
    y: int
    side: int
    image: int
    crop: int | None


Shape = Rect | Words | Tile


@dataclass
class Drawing:
    """A picture of so many pixels. shapes: in the order in which they are painted."""

    width: int
    height: int
    shapes: list[Shape] = field(default_factory=list)

    def rects(self, role: str) -> list[Rect]:
        """The boxes of one role."""
        return [shape for shape in self.shapes if isinstance(shape, Rect) and shape.role == role]
