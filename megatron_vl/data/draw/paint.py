"""From shapes to pixels, by Pillow and its own font (Latin letters: others appear as boxes)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from megatron_vl.data.draw.shapes import BACKGROUND, INK, Drawing, Rect, Tile, Words, colour_of

LABEL_SIZE, SHORT_SIZE = 12, 9


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of pictures."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Pixels that a line of text takes."""
    return int(font(size).getlength(text)) + 1


def paint(drawing: Drawing, view: Callable[[Tile], Image.Image] | None = None) -> Image.Image:
    """8-bit RGB of the drawing's size. view: the picture of a tile, for drawings that have some."""
    image = Image.new("RGB", (drawing.width, drawing.height), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        if isinstance(shape, Rect):
            _paint_rect(canvas, shape)
        elif isinstance(shape, Words):
            canvas.text((shape.x, shape.y), shape.text, fill=colour_of(shape.role), font=font(shape.size))
        else:
            assert view is not None, "this drawing has views"
            image.paste(view(shape).resize((shape.side, shape.side)), (shape.x, shape.y))
    return image


def _paint_rect(canvas: ImageDraw.ImageDraw, rect: Rect) -> None:
    fill = colour_of(rect.role)
    # A border on both sides would leave nothing of a box that is two pixels wide.
    outline = tuple(value * 3 // 5 for value in fill) if rect.outline and rect.width > 3 else None
    last = (rect.x + rect.width - 1, rect.y + rect.height - 1)
    canvas.rectangle(((rect.x, rect.y), last), fill=fill, outline=outline)
    for text, size, margin in ((rect.label, LABEL_SIZE, 6), (rect.short, SHORT_SIZE, 3)):
        if text and text_width(text, size) + margin <= rect.width:
            middle = (rect.x + rect.width / 2, rect.y + rect.height / 2)
            canvas.text(middle, text, fill=INK, font=font(size), anchor="mm")
            return
