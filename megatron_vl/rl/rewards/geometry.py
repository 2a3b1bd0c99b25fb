"""Coordinates in answers: reading them, checking them before any geometry, and the distance of boxes and points.

Numbers are checked first (finite, as many as needed, x1 < x2 and y1 < y2, inside the image), since geometry libraries
answer also where they should not: `shapely.box(10, 10, 0, 0).area` is 100, and comparing with NaN is false either way,
by which one public reward gives a box of NaN full marks. The decay formulas are ours: the report (arXiv 2601.09668)
says "strict distance-decay shaping" and publishes none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.rl.rewards.numeric import parse_float
from megatron_vl.rl.rewards.verdict import NotAnAnswer, shown

CONVENTIONS = ("pixel", "0-1", "0-1000")
MAX_SHAPES = 64  # boxes or points of one answer, corners of a polygon

Point = tuple[float, float]
Box = tuple[float, float, float, float]

_LAYOUT = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[,;:! ]|\\(?=[\[\]()])")  # of LaTeX
_GROUP = re.compile(r"\[([^\[\](){}]*)\]|\(([^\[\](){}]*)\)")
_WORDLIKE_NUMBER = re.compile(r"\s*[+-]?(?:[0-9.]+(?:[eE][+-]?[0-9]+)?|(?i:nan|inf(?:inity)?))\s*")


@dataclass(frozen=True)
class Canvas:
    """The image that coordinates lie in. width, height: pixels. convention: one of CONVENTIONS; 0 and the upper end
    are the borders of the image. clip: what lies outside is moved to the border instead of refused."""

    width: int
    height: int
    convention: str
    clip: bool = False

    def point(self, x: float, y: float) -> Point:
        """In pixels. Raises NotAnAnswer (`not_finite`, `out_of_image`)."""
        limits = {"pixel": (self.width, self.height), "0-1": (1, 1), "0-1000": (1000, 1000)}[self.convention]
        if not (math.isfinite(x) and math.isfinite(y)):
            raise NotAnAnswer("not_finite", f"({x}, {y})")
        inside = tuple(min(max(value, 0.0), float(limit)) for value, limit in zip((x, y), limits))
        if inside != (x, y) and not self.clip:
            raise NotAnAnswer("out_of_image", f"({x:g}, {y:g}) is not within 0..{limits[0]} x 0..{limits[1]}")
        return inside[0] * self.width / limits[0], inside[1] * self.height / limits[1]

    def box(self, numbers: Sequence[float]) -> Box:
        """In pixels. numbers: x1, y1, x2, y2. Raises NotAnAnswer (also `swapped_corners`)."""
        x1, y1, x2, y2 = numbers
        (left, top), (right, bottom) = self.point(x1, y1), self.point(x2, y2)
        if not (left < right and top < bottom):
            raise NotAnAnswer("swapped_corners", f"({x1:g}, {y1:g}, {x2:g}, {y2:g}) lacks x1 < x2 or y1 < y2")
        return left, top, right, bottom

    @property
    def diagonal(self) -> float:
        return math.hypot(self.width, self.height)


@dataclass(frozen=True)
class Decay:
    """How closeness (1: exact, 0: nothing in common) becomes a score.

    score = max(0, (closeness - floor) / (1 - floor)) ** power. Strictly decreasing wherever it is above 0.
    """

    floor: float = 0.0
    power: float = 1.0

    def __call__(self, closeness: float) -> float:
        return min(1.0, max(0.0, (closeness - self.floor) / (1.0 - self.floor))) ** self.power


def number_groups(text: str) -> list[tuple[float, ...]]:
    """The bracketed lists of at least two numbers, between commas or white space, in order; other brackets are prose.

    A text that is nothing but numbers, between commas or white space, is one list.

    Raises NotAnAnswer (`no_coordinates`, `not_finite`, `not_a_number`, `number_too_long`, `too_many`).
    """
    groups, text = [], _LAYOUT.sub("", text)
    for match in _GROUP.finditer(text):
        inside = match[1] if match[1] is not None else match[2]
        parts = inside.split(",") if "," in inside else inside.split()
        enough = any if "," in inside else all  # between spaces, words are prose
        if len(parts) < 2 or not enough(_WORDLIKE_NUMBER.fullmatch(part) for part in parts):
            continue
        if len(groups) == MAX_SHAPES or len(parts) > 2 * MAX_SHAPES:
            raise NotAnAnswer("too_many", f"more than {MAX_SHAPES} lists or pairs of numbers")
        groups.append(tuple(parse_float(part) for part in parts))
    bare = text.replace(",", " ").split()
    if not groups and 2 <= len(bare) <= 2 * MAX_SHAPES and all(map(_WORDLIKE_NUMBER.fullmatch, bare)):
        groups.append(tuple(parse_float(part) for part in bare))
    if not groups:
        raise NotAnAnswer("no_coordinates", f"no list of numbers in {shown(text)}")
    return groups


def iou(one: Box, two: Box) -> float:
    """Intersection over union of two valid boxes, in [0, 1]."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (two[2] - two[0]) * (two[3] - two[1])
    return min(1.0, shared / (areas - shared))


def point_closeness(one: Point, two: Point, radius: float) -> float:
    """1 - distance / radius, at least 0. radius: pixels."""
    return max(0.0, 1.0 - math.dist(one, two) / radius)


def best_assignment(scores: Sequence[Sequence[float]]) -> float:
    """The largest sum of scores when every row takes at most one column and the other way round.

    scores: n x m, finite. Hungarian method with potentials, O(n^2 m); `scipy` would be one more dependency.
    """
    if len(scores) > len(scores[0]):
        scores = [list(column) for column in zip(*scores)]
    rows, columns = len(scores), len(scores[0])
    row_price, column_price = [0.0] * rows, [0.0] * columns
    owner = [-1] * columns
    for newcomer in range(rows):
        slack, origin, done = [math.inf] * columns, [-1] * columns, [False] * columns
        row, column = newcomer, -1
        while row >= 0:
            nearest, gap = -1, math.inf
            for other in range(columns):
                if done[other]:
                    continue
                reduced = -scores[row][other] - row_price[row] - column_price[other]
                if reduced < slack[other]:
                    slack[other], origin[other] = reduced, column
                if slack[other] < gap:
                    nearest, gap = other, slack[other]
            row_price[newcomer] += gap
            for other in range(columns):
                if done[other]:
                    row_price[owner[other]] += gap
                    column_price[other] -= gap
                else:
                    slack[other] -= gap
            column = nearest
            done[column] = True
            row = owner[column]
        while column >= 0:  # along the path back, every column goes to the row before it
            previous = origin[column]
            owner[column] = owner[previous] if previous >= 0 else newcomer
            column = previous
    return sum(scores[row][column] for column, row in enumerate(owner) if row >= 0)
