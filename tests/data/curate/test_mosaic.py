"""Mosaics: boxes and points follow their images, in all conventions and through every resize."""

import random
from itertools import product

import numpy as np
import pytest
from PIL import Image

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.curate.coordinates import (
    CONVENTIONS,
    Placement,
    from_pixels,
    is_inside,
    to_pixels,
    written,
)
from megatron_vl.data.curate.grounding import GroundedObject, read_objects, renumber_references, show_objects
from megatron_vl.data.curate.mosaic import draw, is_chosen, join_objects, join_texts, paint, place_four
from megatron_vl.data.sample import ImagePart, Sample, TextPart

# Half a unit of writing, as a share of the side.
ERROR = {"pixel": lambda side: 0.05, "0-1": lambda side: 0.5e-4 * side, "0-1000": lambda side: 0.5e-3 * side}


def random_case(seed: int):
    drawn = random.Random(seed)
    sizes = [(drawn.randrange(1, 4000), drawn.randrange(1, 4000)) for _ in range(4)]
    boxes = []
    for width, height in sizes:
        x, y = (
            sorted(drawn.uniform(0, width) for _ in range(2)),
            sorted(drawn.uniform(0, height) for _ in range(2)),
        )
        boxes.append([x[0], y[0], x[1], y[1]])
    return sizes, boxes, drawn.choice((64, 728, 1001)), drawn.choice((1.0, 2.0, 50.0))


@pytest.mark.parametrize("seed", range(60))
def test_placements_fit_their_quarter_and_keep_the_aspect(seed):
    sizes, _, cell, upscale = random_case(seed)
    for number, placement in enumerate(place_four(sizes, cell, upscale)):
        left, top = number % 2 * cell, number // 2 * cell
        (x, y), (width, height) = placement.offset, placement.scaled
        assert left <= x and x + width <= left + cell and top <= y and y + height <= top + cell
        scale = min(cell / max(placement.size), upscale)
        assert abs(width - placement.size[0] * scale) <= 1 and abs(height - placement.size[1] * scale) <= 1


@pytest.mark.parametrize(("first", "second"), list(product(CONVENTIONS, CONVENTIONS)))
def test_round_trip_through_all_conventions(first, second):
    """data (first) -> pixels -> mosaic -> written (second) -> mosaic -> image -> first: within the rounding."""
    for seed in range(40):
        sizes, boxes, cell, upscale = random_case(seed)
        canvas = (2 * cell, 2 * cell)
        for placement, box in zip(place_four(sizes, cell, upscale), boxes):
            given = from_pixels(box, first, placement.size)
            numbers = written(
                from_pixels(placement.forward(to_pixels(given, first, placement.size)), second, canvas),
                second,
            )
            back = placement.backward(to_pixels(numbers, second, canvas))
            for axis, (was, now) in enumerate(zip(box, back)):
                side, scaled = placement.size[axis % 2], placement.scaled[axis % 2]
                assert abs(was - now) <= ERROR[second](canvas[0]) * side / scaled + 1e-6
            assert from_pixels(
                to_pixels(given, first, placement.size), first, placement.size
            ) == pytest.approx(given)


def test_resizing_twice_is_resizing_once():
    once = Placement((400, 300), (200, 150), (20, 10))
    first, second = Placement((400, 300), (800, 600)), Placement((800, 600), (200, 150), (20, 10))
    assert (
        second.forward(first.forward([40, 30, 400, 300]))
        == once.forward([40, 30, 400, 300])
        == [40, 25, 220, 160]
    )


@pytest.mark.parametrize(
    ("convention", "expected"), [("pixel", [10.1, 20]), ("0-1", [0.1235, 1]), ("0-1000", [123, 500])]
)
def test_how_numbers_are_written(convention, expected):
    given = {"pixel": [10.06, 20.0], "0-1": [0.12346, 0.99999], "0-1000": [123.4, 499.6]}[convention]
    assert written(given, convention) == expected
    assert [type(value) for value in written([1.0], convention)] == [int]


def test_pixels_lie_where_coordinates_say():
    """A red mark on each image is found in the mosaic at the place that its box was moved to."""
    sizes, images, boxes = [(300, 200), (90, 400), (64, 64), (1500, 700)], [], []
    for width, height in sizes:
        box = (width // 4, height // 2, width // 4 + max(8, width // 5), height // 2 + max(8, height // 6))
        pixels = np.full((height, width, 3), 90, dtype=np.uint8)
        pixels[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
        images.append(Image.fromarray(pixels))
        boxes.append([GroundedObject("mark", "box", tuple(map(float, box)))])
    placements = place_four(sizes, 256, 2.0)
    canvas = np.asarray(paint(images, placements, 256, 0)).astype(int)
    red = (canvas[..., 0] > 172) & (canvas[..., 1] < 45)
    for number, item in enumerate(join_objects(boxes, placements)):
        quarter = np.zeros_like(red)
        quarter[number // 2 * 256 :, number % 2 * 256 :][:256, :256] = True
        rows, columns = np.nonzero(red & quarter)
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.array(found) - item.coordinates).max() <= 1.0
    assert (canvas[0, :256] == 0).all() and canvas.shape == (512, 512, 3)


def test_texts_take_their_places_and_references_move():
    texts = ["a <object:0> <object:1>", " b ", "c <object:0>", "{top_left} <object:0>"]
    joined = join_texts("{top_right}|{top_left}|{bottom_left}|{bottom_right}", texts, [2, 0, 1, 1])
    assert joined == "b|a <object:0> <object:1>|c <object:2>|{top_left} <object:3>"
    assert renumber_references("<object:9>", 3) == "<object:12>"


def test_objects_of_a_record():
    record = {"objects": [{"label": "x", "box": [0, 0, 500, 1000]}, {"point": [1, 2], "image": 1}]}
    objects = read_objects(record, "0-1000", [(200, 100), (1000, 1000)])
    assert objects[0].coordinates == (0, 0, 100, 100) and objects[1].coordinates == (1, 2)
    sample = Sample("s", document=(ImagePart("a"), TextPart("at <object:0> and <object:1>")))
    shown = show_objects(sample, objects, "pixel", [(200, 100), (1000, 1000)])
    assert shown.document[1].text == "at [0, 0, 100, 100] and [1, 2]"
    assert read_objects({}, "pixel", []) == []


@pytest.mark.parametrize(
    "objects",
    [
        "x",
        [3],
        [{"label": "none"}],
        [{"box": [0, 0, 1, 1], "point": [0, 0]}],
        [{"box": [0, 0, 1]}],
        [{"box": [0, 0, 1, True]}],
        [{"point": [0, float("nan")]}],
        [{"point": ["0", 1]}],
        [{"point": [0, 0], "image": 1}],
        [{"point": [0, 0], "image": -1}],
        [{"point": [0, 0], "label": 3}],
        [{"box": [5, 0, 4, 1]}],
        [{"box": [0, 0, 101, 50]}],
        [{"point": [-1, 0]}],
    ],
)
def test_bad_objects_are_refused(objects):
    with pytest.raises(SampleRefused) as refusal:
        read_objects({"objects": objects}, "pixel", [(100, 50)])
    assert refusal.value.reason == "bad_objects"


def test_a_reference_to_nothing_is_refused():
    with pytest.raises(SampleRefused, match="bad_objects"):
        show_objects(Sample("s", document=(TextPart("<object:0>"),)), [], "pixel", [])


def test_rounding_may_leave_the_image_by_half_a_pixel():
    assert is_inside([-0.5, 50.5], (100, 50)) and not is_inside([-0.6, 0], (100, 50))
    assert not is_inside([float("inf"), 0], (100, 50))


def test_draws_depend_on_the_place_only():
    chosen = [is_chosen(0, "web", number, 0.25) for number in range(4000)]
    assert chosen == [is_chosen(0, "web", number, 0.25) for number in range(4000)]
    assert 850 < sum(chosen) < 1150
    assert draw(0, "web", 1) != draw(1, "web", 1) != draw(0, "other", 1)
    assert not any(is_chosen(0, "w", number, 0.0) for number in range(99))
    assert all(is_chosen(0, "w", number, 1.0) for number in range(99))
