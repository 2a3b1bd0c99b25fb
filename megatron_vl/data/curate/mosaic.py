"""Four image-text pairs as one: layout (pure), pixels, text and objects.

The report names mosaics and says no more; layout, resize and text are ours. Every image is scaled to fit into
its quarter (aspect kept), and laid in the middle of it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from PIL import Image
from PIL.Image import Resampling

from megatron_vl.data.curate.coordinates import Placement, Size
from megatron_vl.data.curate.grounding import GroundedObject, renumber_references

QUARTERS = ("top_left", "top_right", "bottom_left", "bottom_right")
_FIELD = re.compile(r"\{(" + "|".join(QUARTERS) + r")\}")


def is_chosen(seed: int, source: str, line: int, probability: float) -> bool:
    """Whether a pair goes into a mosaic: a draw that depends on the place of the line only."""
    return draw(seed, source, line) < probability


def draw(seed: int, *place: str | int) -> float:
    """A number in [0, 1) for a place, the same in every process and order."""
    text = "\0".join([str(seed), *map(str, place)]).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") / 2**64


def place_four(sizes: Sequence[Size], cell: int, max_upscale: float) -> list[Placement]:
    """Where four images of `sizes` land on a canvas of 2 cell x 2 cell, row by row."""
    assert len(sizes) == 4, sizes
    return [
        _place(size, cell, max_upscale, (column * cell, row * cell))
        for size, (row, column) in zip(sizes, [(0, 0), (0, 1), (1, 0), (1, 1)])
    ]


def paint(
    images: Sequence[Image.Image], placements: Sequence[Placement], cell: int, fill: int
) -> Image.Image:
    """The canvas: 8-bit RGB. images: RGB, of the sizes of their placements."""
    canvas = Image.new("RGB", (2 * cell, 2 * cell), (fill, fill, fill))
    for image, placement in zip(images, placements):
        assert image.size == placement.size, (image.size, placement.size)
        scaled = (
            image if image.size == placement.scaled else image.resize(placement.scaled, Resampling.BICUBIC)
        )
        canvas.paste(scaled, placement.offset)
    return canvas


def to_jpeg(canvas: Image.Image, quality: int) -> bytes:
    """The file of a mosaic. Colour is not subsampled: small coloured text would suffer."""
    buffer = io.BytesIO()
    canvas.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def join_texts(template: str, texts: Sequence[str], object_counts: Sequence[int]) -> str:
    """The text of a mosaic: the four texts in the places of the template, references renumbered."""
    first = [sum(object_counts[:number]) for number in range(4)]
    values: Mapping[str, str] = {
        name: renumber_references(text.strip(), start) for name, text, start in zip(QUARTERS, texts, first)
    }
    return _FIELD.sub(lambda match: values[match[1]], template)


def join_objects(
    objects: Sequence[Sequence[GroundedObject]], placements: Sequence[Placement]
) -> list[GroundedObject]:
    """The objects of all four, in pixels of the canvas, in the order of `join_texts`."""
    return [item.moved(placement, 0) for items, placement in zip(objects, placements) for item in items]


def missing_fields(template: str) -> list[str]:
    """Quarters that a template forgets."""
    return [name for name in QUARTERS if f"{{{name}}}" not in template]


def _place(size: Size, cell: int, max_upscale: float, corner: tuple[int, int]) -> Placement:
    scale = min(cell / max(size), max_upscale)
    scaled = tuple(max(1, min(cell, round(side * scale))) for side in size)
    offset = tuple(start + (cell - side) // 2 for start, side in zip(corner, scaled))
    return Placement(size, scaled, offset)
