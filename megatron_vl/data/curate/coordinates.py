"""Boxes and points: the three ways of writing them, and how they follow an image that is resized and moved.

All coordinates are continuous: an image of width w spans x from 0 (left edge) to w (right edge), so the pixel
in column c covers [c, c + 1]. This makes resizing a plain multiplication. `pixel` counts pixels of the image,
`0-1` and `0-1000` are shares of its sides; the last is written in whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PIXEL, UNIT, THOUSAND = "pixel", "0-1", "0-1000"
CONVENTIONS = (PIXEL, UNIT, THOUSAND)

# Digits kept in writing: 0.1 pixel, and 0.2 pixel of a side of 2000. The third is whole by definition.
_DIGITS = {PIXEL: 1, UNIT: 4, THOUSAND: 0}

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """Where an image of `size` lands on a canvas.

    size: (width, height) before. scaled: after resizing. offset: (x, y) of its top left corner on the canvas.
    """

    size: Size
    scaled: Size
    offset: tuple[int, int] = (0, 0)

    def forward(self, coordinates: Sequence[float]) -> list[float]:
        """x, y, x, y, ... in pixels of the image -> in pixels of the canvas."""
        return [
            self.offset[number % 2] + value * self.scaled[number % 2] / self.size[number % 2]
            for number, value in enumerate(coordinates)
        ]

    def backward(self, coordinates: Sequence[float]) -> list[float]:
        """The inverse of `forward`."""
        return [
            (value - self.offset[number % 2]) * self.size[number % 2] / self.scaled[number % 2]
            for number, value in enumerate(coordinates)
        ]


def to_pixels(coordinates: Sequence[float], convention: str, size: Size) -> list[float]:
    """x, y, x, y, ... in a convention -> in pixels of an image of `size` (width, height)."""
    if convention == PIXEL:
        return [float(value) for value in coordinates]
    whole = 1 if convention == UNIT else 1000
    return [value * size[number % 2] / whole for number, value in enumerate(coordinates)]


def from_pixels(coordinates: Sequence[float], convention: str, size: Size) -> list[float]:
    """The inverse of `to_pixels`, not rounded."""
    if convention == PIXEL:
        return [float(value) for value in coordinates]
    whole = 1 if convention == UNIT else 1000
    return [value * whole / size[number % 2] for number, value in enumerate(coordinates)]


def written(coordinates: Sequence[float], convention: str) -> list[int | float]:
    """The numbers as they stand in data: rounded to nearest, whole ones without a point.

    `0-1000`: at most 0.5 off, which is 1.5 pixels on a side of 3024.
    """
    rounded = [round(value, _DIGITS[convention]) for value in coordinates]
    return [int(value) if value == int(value) else value for value in rounded]


def is_inside(coordinates: Sequence[float], size: Size, slack: float = 0.5) -> bool:
    """Whether all coordinates (pixels) lie on an image of `size`, up to `slack` pixels of rounding."""
    return all(
        math.isfinite(value) and -slack <= value <= size[number % 2] + slack
        for number, value in enumerate(coordinates)
    )
