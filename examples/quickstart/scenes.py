"""Pictures of the quickstart: what one shows, and how it is drawn.

A :class:`Scene` is a plain description; :func:`draw` makes the picture with Pillow.  All sizes are pixels,
``(width, height)``.  The sizes are chosen for the tiny model (global view 112, crops 56, longest side 336):
``CROP_FAMILIES`` names ranges of width and height for each number of crops.  The cropping rules never give
exactly one crop: a picture long enough to be cut at all is cut at least in two.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (215, 30, 35),
    "orange": (245, 140, 20),
    "yellow": (240, 220, 40),
    "green": (30, 150, 60),
    "cyan": (40, 205, 215),
    "blue": (35, 70, 205),
    "purple": (125, 45, 165),
    "pink": (250, 140, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
POSITIONS = (
    "top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
COUNTS = ("1", "2", "3", "4", "5")
WORDS = (
    "ant", "bee", "cat", "dog", "elk", "fox", "hen", "jay", "owl", "pig", "rat", "yak",
    "bus", "car", "cup", "egg", "hat", "ink", "key", "map", "net", "pen", "sun", "zoo",
)  # fmt: skip
BOX_GRID = 10

# crops: ((long side range), (short side range)), both inclusive; a portrait picture swaps them.
CROP_FAMILIES = {
    0: ((75, 112), (75, 112)),
    2: ((113, 123), (57, 67)),
    3: ((124, 179), (57, 67)),
    4: ((113, 123), (72, 123)),
    5: ((236, 291), (57, 67)),
    6: ((124, 179), (72, 123)),
}


@dataclass(frozen=True)
class Scene:
    """What one picture shows.

    ``objects`` holds the pixel box ``(left, top, right, bottom)`` of every object, all of one colour and
    shape; a scene with a ``word`` has one object, the plate on which the word is written.
    """

    size: tuple[int, int]
    colour: str
    shape: str
    objects: tuple[tuple[int, int, int, int], ...]
    word: str | None
    background: tuple[int, int, int]
    noise: float
    seed: int

    def position(self) -> str:
        """Ninth of the picture that holds the centre of the first object."""
        left, top, right, bottom = self.objects[0]
        column = int(3 * (left + right) / (2 * self.size[0]))
        row = int(3 * (top + bottom) / (2 * self.size[1]))
        return POSITIONS[3 * row + column]

    def box(self) -> str:
        """``x0 y0 x1 y1`` of the first object: the cells of a 10 x 10 grid that hold its corners."""
        left, top, right, bottom = self.objects[0]
        width, height = self.size
        cells = (
            BOX_GRID * left // width,
            BOX_GRID * top // height,
            BOX_GRID * (right - 1) // width,
            BOX_GRID * (bottom - 1) // height,
        )
        return " ".join(str(cell) for cell in cells)


def pick_size(rng: random.Random, crops: int) -> tuple[int, int]:
    """A picture size that the tiny model cuts into ``crops`` crops; three in ten are portrait."""
    long_range, short_range = CROP_FAMILIES[crops]
    long_side, short_side = rng.randint(*long_range), rng.randint(*short_range)
    return (short_side, long_side) if rng.random() < 0.3 else (long_side, short_side)


def _surroundings(rng: random.Random) -> dict:
    """A plain grey background, light or dark, and a little noise, for every kind of scene."""
    grey = rng.randint(205, 255) if rng.random() < 0.7 else rng.randint(10, 50)
    background = tuple(max(0, min(255, grey + rng.randint(-4, 4))) for _ in range(3))
    return {"background": background, "noise": rng.uniform(0, 5), "seed": rng.getrandbits(32)}


def single_scene(rng: random.Random, size: tuple[int, int], colour: str, shape: str, position: str) -> Scene:
    """One large object whose centre lies well inside the ninth ``position``."""
    width, height = size
    column, row = POSITIONS.index(position) % 3, POSITIONS.index(position) // 3
    side = round(rng.uniform(0.4, 0.56) * min(size))
    centre_x = width * (column + rng.uniform(0.2, 0.8)) / 3
    centre_y = height * (row + rng.uniform(0.2, 0.8)) / 3
    left = min(max(round(centre_x - side / 2), 0), width - side)
    top = min(max(round(centre_y - side / 2), 0), height - side)
    objects = ((left, top, left + side, top + side),)
    scene = Scene(size, colour, shape, objects, None, **_surroundings(rng))
    # Pushing the object back inside may have moved its centre into the next ninth: then draw lots again.
    return scene if scene.position() == position else single_scene(rng, size, colour, shape, position)


def count_scene(rng: random.Random, size: tuple[int, int], colour: str, shape: str, count: int) -> Scene:
    """``count`` equal objects in different cells of a grid, so that none touches another."""
    width, height = size
    across, down = (
        (3, 3) if max(size) < 1.5 * min(size) else (4, 2) if max(size) < 2.2 * min(size) else (6, 2)
    )
    columns, rows = (across, down) if width >= height else (down, across)
    cell_w, cell_h = width // columns, height // rows
    side = round(rng.uniform(0.7, 0.85) * min(cell_w, cell_h))
    objects = []
    for cell in rng.sample(range(columns * rows), count):
        left = (cell % columns) * cell_w + rng.randint(0, cell_w - side)
        top = (cell // columns) * cell_h + rng.randint(0, cell_h - side)
        objects.append((left, top, left + side, top + side))
    return Scene(size, colour, shape, tuple(objects), None, **_surroundings(rng))


def word_scene(rng: random.Random, size: tuple[int, int], colour: str, word: str) -> Scene:
    """A word on a coloured plate that fills most of the picture."""
    width, height = size
    plate_w = round(width * rng.uniform(0.8, 0.95))
    plate_h = round(height * rng.uniform(0.75, 0.95))
    left, top = rng.randint(0, width - plate_w), rng.randint(0, height - plate_h)
    objects = ((left, top, left + plate_w, top + plate_h),)
    return Scene(size, colour, "square", objects, word, **_surroundings(rng))


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], colour) -> None:
    left, top, right, bottom = box
    side = right - left
    inner = (left, top, right - 1, bottom - 1)
    if shape == "circle":
        canvas.ellipse(inner, fill=colour)
    elif shape == "square":
        canvas.rectangle(inner, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(left, bottom - 1), (right - 1, bottom - 1), ((left + right) / 2, top)], fill=colour)
    elif shape == "ring":
        canvas.ellipse(inner, outline=colour, width=max(2, side // 4))
    elif shape == "cross":
        third = side / 3
        canvas.rectangle((left + third, top, right - 1 - third, bottom - 1), fill=colour)
        canvas.rectangle((left, top + third, right - 1, bottom - 1 - third), fill=colour)
    elif shape == "star":
        corners = []
        for corner in range(10):
            radius = side / 2 * (1 if corner % 2 == 0 else 0.42)
            angle = math.pi * corner / 5
            corners.append(
                ((left + right) / 2 + radius * math.sin(angle), (top + bottom) / 2 - radius * math.cos(angle))
            )
        canvas.polygon(corners, fill=colour)
    else:
        raise ValueError(f"shape {shape!r} is not one of {SHAPES}")


def _draw_word(canvas: ImageDraw.ImageDraw, word: str, plate: tuple[int, int, int, int], colour) -> None:
    left, top, right, bottom = plate
    canvas.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    # Height and width of the text grow with the font size, so one measurement gives the size that fits.
    probe = ImageFont.load_default(size=100)
    x0, y0, x1, y1 = probe.getbbox(word)
    font = ImageFont.load_default(
        size=max(8, math.floor(85 * min((right - left) / (x1 - x0), (bottom - top) / (y1 - y0))))
    )
    ink = (255, 255, 255) if sum(colour) < 420 else (0, 0, 0)
    canvas.text(((left + right) / 2, (top + bottom) / 2), word, fill=ink, font=font, anchor="mm")


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB; the same scene always gives the same pixels."""
    image = Image.new("RGB", scene.size, scene.background)
    canvas = ImageDraw.Draw(image)
    rng = random.Random(scene.seed)
    # No two pictures share their exact colours, so "red" has to be learned as a range.
    colour = tuple(max(0, min(255, part + rng.randint(-14, 14))) for part in COLOURS[scene.colour])
    if scene.word is not None:
        _draw_word(canvas, scene.word, scene.objects[0], colour)
    else:
        for box in scene.objects:
            _draw_shape(canvas, scene.shape, box, colour)
    return _add_noise(image, scene.noise, scene.seed)


def _add_noise(image: Image.Image, sigma: float, seed: int) -> Image.Image:
    """Gaussian noise of ``sigma`` grey levels, the same on all three channels."""
    pixels = np.asarray(image, dtype=np.float32)
    noise = np.random.default_rng(seed).normal(0.0, sigma, size=pixels.shape[:2])
    return Image.fromarray((pixels + noise[..., None]).round().clip(0, 255).astype(np.uint8))
