"""Verifiers of places in an image: boxes by IoU, points by distance, polygons by IoU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_vl.errors import ConfigError
from megatron_vl.rl.rewards.geometry import (
    MAX_SHAPES,
    Box,
    Canvas,
    Decay,
    Point,
    best_assignment,
    iou,
    number_groups,
    point_closeness,
)
from megatron_vl.rl.rewards.verdict import NotAnAnswer, Ok


def read_boxes(text: str, canvas: Canvas) -> list[Box]:
    """Boxes of an answer, in pixels: lists of four numbers, or pairs of points "(x1, y1), (x2, y2)".

    Raises NotAnAnswer: see `number_groups` and `Canvas.box`; `wrong_count` for any other number of numbers.
    """
    groups = number_groups(text)
    if all(len(group) == 2 for group in groups) and len(groups) % 2 == 0:
        groups = [first + second for first, second in zip(groups[::2], groups[1::2])]
    return [canvas.box(group) for group in _all_of_length(groups, 4, "a box")]


def read_points(text: str, canvas: Canvas) -> list[Point]:
    """Points of an answer, in pixels. Raises NotAnAnswer as `read_boxes`."""
    return [canvas.point(*group) for group in _all_of_length(number_groups(text), 2, "a point")]


def read_polygon(text: str, canvas: Canvas) -> list[Point]:
    """Corners of the one polygon of an answer, in pixels: a list of points, or of x1, y1, x2, y2, x3, y3, ...

    Raises NotAnAnswer as `read_boxes`, and `wrong_count` for less than three corners.
    """
    groups = number_groups(text)
    if len(groups) == 1 and len(groups[0]) % 2 == 0:
        groups = list(zip(groups[0][::2], groups[0][1::2]))
    return polygon_corners(_all_of_length(groups, 2, "a corner"), canvas)


def polygon_corners(corners: Sequence[Sequence[float]], canvas: Canvas) -> list[Point]:
    """Checked corners, in pixels. Raises NotAnAnswer (`wrong_count`, `too_many`, `out_of_image`, ...)."""
    if len(corners) < 3:
        raise NotAnAnswer("wrong_count", f"a polygon has at least 3 corners, not {len(corners)}")
    if len(corners) > MAX_SHAPES:
        raise NotAnAnswer("too_many", f"a polygon of {len(corners)} corners, at most {MAX_SHAPES}")
    return [canvas.point(*corner) for corner in corners]


def score_boxes(gold: Sequence[Box], canvas: Canvas, decay: Decay, text: str) -> Ok:
    """decay(IoU) of the box; for several, the best one-to-one assignment over max(boxes, gold boxes).

    gold: pixels. One gold box takes one box: several different ones are `several_answers`. Raises NotAnAnswer.
    """
    return _matched(gold, read_boxes(text, canvas), lambda one, two: decay(iou(one, two)))


def score_points(gold: Sequence[Point], canvas: Canvas, decay: Decay, radius: float, text: str) -> Ok:
    """decay(1 - distance / (radius * diagonal)) of the point, several as in `score_boxes`.

    gold: pixels. radius: share of the image's diagonal at which nothing is left. Raises NotAnAnswer.
    """
    reach = radius * canvas.diagonal
    return _matched(gold, read_points(text, canvas), lambda one, two: decay(point_closeness(one, two, reach)))


def score_polygon(gold: Sequence[Point], canvas: Canvas, decay: Decay, text: str) -> Ok:
    """decay(IoU of the areas). gold: pixels, see `valid_polygon`. Raises NotAnAnswer, also `bad_polygon`."""
    one, two = valid_polygon(gold), valid_polygon(read_polygon(text, canvas))
    shared = one.intersection(two).area
    share = shared / (one.area + two.area - shared)
    return Ok(decay(share), {"iou": min(1.0, share)})


def valid_polygon(corners: Sequence[Point]) -> shapely.Polygon:  # noqa: F821
    """The polygon as shapely sees it. Raises NotAnAnswer (`bad_polygon`): crossing itself, or without area."""
    try:
        import shapely
    except ImportError as error:
        raise ConfigError(
            "polygon rewards need the package shapely; pip install 'megatron-vl[rl]', or leave such tasks out"
        ) from error
    polygon = shapely.Polygon(corners)
    if not polygon.is_valid or polygon.area <= 0:
        raise NotAnAnswer("bad_polygon", "it crosses itself or has no area")
    return polygon


def _matched(gold: Sequence, given: Sequence, score: Callable[..., float]) -> Ok:
    if len(gold) == 1:
        if len(set(given)) > 1:
            raise NotAnAnswer("several_answers", f"{len(given)} places where one is asked")
        return Ok(score(given[0], gold[0]))
    total = best_assignment([[score(one, two) for two in gold] for one in given])
    count = max(len(given), len(gold))
    return Ok(min(1.0, max(0.0, total / count)), {"count_right": float(len(given) == len(gold))})


def _all_of_length(groups: list[tuple[float, ...]], length: int, what: str) -> list[tuple[float, ...]]:
    wrong = [group for group in groups if len(group) != length]
    if wrong:
        raise NotAnAnswer("wrong_count", f"{len(wrong[0])} numbers, where {what} has {length}")
    return groups
