"""The objects of a record: boxes and points on its images, and the places in its text that show them.

    "objects": [{"label": "dog", "box": [x1, y1, x2, y2]}, {"label": "cup", "point": [x, y], "image": 1}]

`image` is the number of the image (0 when absent). A text shows object K by `<object:K>`; in the output the
numbers stand there, in the convention of the output. Text that holds numbers of its own is not touched, since
nobody can tell coordinates from other numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.curate.coordinates import Placement, Size, from_pixels, is_inside, to_pixels, written
from megatron_vl.data.sample import Message, Part, Sample, TextPart

REFERENCE = re.compile(r"<object:(\d+)>")
_LENGTHS = {"box": 4, "point": 2}


@dataclass(frozen=True)
class GroundedObject:
    """kind: box (x1, y1, x2, y2) or point (x, y). coordinates: pixels of image number `image`."""

    label: str
    kind: str
    coordinates: tuple[float, ...]
    image: int = 0

    def moved(self, placement: Placement, image: int) -> GroundedObject:
        """The object after its image was placed on a canvas that is image number `image`."""
        return replace(self, coordinates=tuple(placement.forward(self.coordinates)), image=image)

    def as_record(self, convention: str, sizes: Sequence[Size]) -> dict:
        numbers = written(from_pixels(self.coordinates, convention, sizes[self.image]), convention)
        return {"label": self.label, self.kind: numbers, "image": self.image}


def read_objects(
    record: Mapping[str, object], convention: str, sizes: Sequence[Size]
) -> list[GroundedObject]:
    """The objects of a record, in pixels. sizes: (width, height) of its images.

    Raises SampleRefused bad_objects for a wrong form, an image that does not exist, a box whose second corner
    comes first, or coordinates off the image.
    """
    value = record.get("objects")
    if value is None:
        return []
    if not isinstance(value, list):
        raise SampleRefused("bad_objects", f"objects is a {type(value).__name__}, not a list")
    return [_object(item, f"objects[{number}]", convention, sizes) for number, item in enumerate(value)]


def show_objects(
    sample: Sample, objects: Sequence[GroundedObject], convention: str, sizes: Sequence[Size]
) -> Sample:
    """The sample with numbers in place of its references. Raises SampleRefused bad_objects for unknown ones."""
    shown = [
        json.dumps(written(from_pixels(item.coordinates, convention, sizes[item.image]), convention))
        for item in objects
    ]

    def numbers(match: re.Match[str]) -> str:
        place = int(match[1])
        if place >= len(shown):
            raise SampleRefused(
                "bad_objects", f"the text shows {match[0]}, but there are {len(shown)} objects"
            )
        return shown[place]

    return map_texts(sample, lambda text: REFERENCE.sub(numbers, text))


def renumber_references(text: str, first: int) -> str:
    """References of a text whose objects are moved to the places from `first` on."""
    return REFERENCE.sub(lambda match: f"<object:{int(match[1]) + first}>", text)


def map_texts(sample: Sample, change: Callable[[str], str]) -> Sample:
    """The sample with every text changed."""

    def changed(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(TextPart(change(part.text)) if isinstance(part, TextPart) else part for part in parts)

    messages = tuple(Message(message.role, changed(message.parts)) for message in sample.messages)
    return replace(sample, messages=messages, document=changed(sample.document))


def _object(item: object, where: str, convention: str, sizes: Sequence[Size]) -> GroundedObject:
    kinds = [kind for kind in _LENGTHS if kind in item] if isinstance(item, Mapping) else []
    if len(kinds) != 1:
        raise SampleRefused("bad_objects", f"{where} must be an object with either box or point")
    kind, numbers = kinds[0], item[kinds[0]]
    label, image = item.get("label", ""), item.get("image", 0)
    if not isinstance(label, str):
        raise SampleRefused("bad_objects", f"{where}.label is no string")
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < len(sizes):
        raise SampleRefused("bad_objects", f"{where}.image is {image!r}; the sample has {len(sizes)} images")
    if (
        not isinstance(numbers, list)
        or len(numbers) != _LENGTHS[kind]
        or not all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
    ):
        raise SampleRefused("bad_objects", f"{where}.{kind} must be {_LENGTHS[kind]} finite numbers")
    pixels = to_pixels(numbers, convention, sizes[image])
    if not is_inside(pixels, sizes[image]):
        width, height = sizes[image]
        raise SampleRefused(
            "bad_objects",
            f"{where}.{kind} = {numbers} ({convention}) is off its image of {width}x{height} pixels",
        )
    if kind == "box" and not (pixels[0] <= pixels[2] and pixels[1] <= pixels[3]):
        raise SampleRefused(
            "bad_objects", f"{where}.box = {numbers}: the second corner comes before the first"
        )
    return GroundedObject(label, kind, tuple(pixels), image)
