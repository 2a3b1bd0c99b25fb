"""Where the views of an image lie: multi-crop geometry as pure functions of its width and height.

An image becomes one global view and, unless it is small, a grid of local crops. Everything here follows from
the size alone, so token counts, packing and refusals need no pixels. Sizes are (width, height) in pixels,
boxes are (left, top, right, bottom). The rules are those of the released STEP3-VL-10B processing, including
where it works in floating point: integer arithmetic would give other grids for sizes such as 1050x250.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_vl.errors import ImageRefused
from megatron_vl.plan.vision_share import CROP, GLOBAL

Size = tuple[int, int]
Box = tuple[int, int, int, int]

SQUARE_ENOUGH = 1.5  # a small image up to this long/short ratio gets no crops
VERY_LONG = 4.0  # beyond this ratio the window shrinks to the shorter side, and tiny images are padded
ROUND_UP_ABOVE = 0.2  # a further window is added when more than this share of one is left over
BOUNDARY_RULES = ("le", "lt")


@dataclass(frozen=True)
class CropRule:
    """The constants of the geometry. The defaults are those of STEP3-VL-10B.

    global_size: side of the global view, and the longest side of a "small" image.
    crop_size: side of a crop, and of the window that cuts it.
    max_side: longer images are scaled down to it.
    boundary_rule: `le` = an image exactly `global_size` long is small, as released; `lt` = it is large, as in
        newer vLLM (0.33.0 for one).
    pad_below: very long images that are thinner than this are padded to a square.
    """

    global_size: int = 728
    crop_size: int = 504
    max_side: int = 3024
    boundary_rule: str = "le"
    pad_below: int = 32

    def __post_init__(self) -> None:
        assert self.boundary_rule in BOUNDARY_RULES, self.boundary_rule

    @classmethod
    def for_model(cls, global_size: int, crop_size: int, boundary_rule: str = "le") -> CropRule:
        """The rule of a model with other view sizes: the longest side kept is 6 windows, 3024 = 6 x 504."""
        return cls(global_size, crop_size, 6 * crop_size, boundary_rule)

    @property
    def name(self) -> str:
        """`le728`, `lt728`, ...: the name that the golden files give to the boundary rule."""
        return f"{self.boundary_rule}{self.global_size}"

    def is_small(self, longer_side: int) -> bool:
        """Whether an image of this longer side counts as small."""
        return longer_side < self.global_size or (
            self.boundary_rule == "le" and longer_side == self.global_size
        )


RELEASED = CropRule()


@dataclass(frozen=True)
class CropPlan:
    """The views of one image.

    size: upright image. padded_size: after padding to a square (image top left, rest black), or `size`.
    resized: after the longest side was limited; source of both kinds of view. window: side of the cutting
    window, 0 = no crops. canvas: what `resized` is stretched to before cutting, None without crops.
    """

    size: Size
    padded_size: Size
    resized: Size
    window: int
    canvas: Size | None
    rows: int
    cols: int

    @property
    def padded(self) -> bool:
        """Whether the image is put on a black square first."""
        return self.padded_size != self.size

    @property
    def num_crops(self) -> int:
        """Local crops, not counting the global view."""
        return self.rows * self.cols

    @property
    def num_newlines(self) -> int:
        """`<patch_newline>` tokens: one between rows of crops."""
        return max(self.rows - 1, 0)

    @property
    def newline_after_crops(self) -> list[int]:
        """Crops that `<patch_newline>` follows: the last of each row, except in the last row."""
        return [row * self.cols - 1 for row in range(1, self.rows)]

    @property
    def view_kinds(self) -> list[int]:
        """Kinds of the views in the order of the token stream: the crops row by row, the global view last."""
        return [CROP] * self.num_crops + [GLOBAL]

    def box(self, crop: int) -> Box:
        """Box of a crop on the canvas. Beyond a canvas that is smaller than the window it is black."""
        assert 0 <= crop < self.num_crops, f"crop {crop} of {self.num_crops}"
        top, left = (self.window * index for index in divmod(crop, self.cols))
        return left, top, left + self.window, top + self.window


def plan_crops(width: int, height: int, rule: CropRule = RELEASED) -> CropPlan:
    """Plans the views of an upright image of `width` x `height` pixels.

    Errors: `ImageRefused` `zero_size`; `too_thin` when limiting the longer side leaves nothing of the shorter
    one. Source: the released processing code and vLLM, which agree but for `boundary_rule`.
    """
    if width < 1 or height < 1:
        raise ImageRefused("zero_size", f"the image is {width}x{height} pixels")
    padded_size = _pad(width, height, rule)
    resized = _limit(padded_size, rule.max_side)
    if min(resized) < 1:
        raise ImageRefused(
            "too_thin",
            f"{width}x{height}: nothing is left of the shorter side when the longer one is "
            f"limited to {rule.max_side} pixels",
        )
    window = _window(resized, rule)
    if window == 0:
        return CropPlan((width, height), padded_size, resized, 0, None, rows=0, cols=0)
    canvas = (_snap(resized[0], window), _snap(resized[1], window))
    cols, rows = (max(side // window, 1) for side in canvas)
    return CropPlan((width, height), padded_size, resized, window, canvas, rows=rows, cols=cols)


def check_limits(
    plan: CropPlan,
    *,
    max_crops: int | None = None,
    max_aspect_ratio: float | None = None,
    max_pixels: int | None = None,
) -> None:
    """Refuses an image whose views would be out of proportion. None = no such limit.

    These are rules of the data, not of the model: 10000x32 is legal and makes 336 crops. `max_pixels` is held
    against the padded image: 1x60000 has few pixels, the black square around it has 3.6e9.
    Errors: `ImageRefused` `aspect_ratio`, `too_many_pixels`, `too_many_crops`.
    """
    width, height = plan.size
    ratio = max(width, height) / min(width, height)
    if max_aspect_ratio is not None and ratio > max_aspect_ratio:
        raise ImageRefused(
            "aspect_ratio", f"{width}x{height} is {ratio:.4g}:1, the limit is {max_aspect_ratio:g}:1"
        )
    pixels = plan.padded_size[0] * plan.padded_size[1]
    if max_pixels is not None and pixels > max_pixels:
        padded = f", padded to {plan.padded_size[0]}x{plan.padded_size[1]}," if plan.padded else ""
        raise ImageRefused(
            "too_many_pixels", f"{width}x{height}{padded} has {pixels} pixels, the limit is {max_pixels}"
        )
    if max_crops is not None and plan.num_crops > max_crops:
        raise ImageRefused(
            "too_many_crops", f"{width}x{height} makes {plan.num_crops} crops, the limit is {max_crops}"
        )


class ImageTokenIds(Protocol):
    """The special tokens around visual features; `config.model.SpecialTokens` has them."""

    im_patch: int
    im_start: int
    im_end: int
    patch_start: int
    patch_end: int
    patch_newline: int


def num_image_tokens(plan: CropPlan, global_tokens: int = 169, crop_tokens: int = 81) -> int:
    """Tokens of one image in the stream: features, start and end of each view, newlines."""
    return plan.num_crops * (crop_tokens + 2) + plan.num_newlines + global_tokens + 2


def num_image_features(plan: CropPlan, global_tokens: int = 169, crop_tokens: int = 81) -> int:
    """`<im_patch>` slots of one image = rows that the projector makes of its views."""
    return plan.num_crops * crop_tokens + global_tokens


def image_ids_rle(
    plan: CropPlan, tokens: ImageTokenIds, global_tokens: int = 169, crop_tokens: int = 81
) -> list[tuple[int, int]]:
    """The token string of one image as (id, count) runs: crops row by row, then the global view."""
    newlines = set(plan.newline_after_crops)
    runs: list[tuple[int, int]] = []
    for crop in range(plan.num_crops):
        runs += [(tokens.patch_start, 1), (tokens.im_patch, crop_tokens), (tokens.patch_end, 1)]
        if crop in newlines:
            runs.append((tokens.patch_newline, 1))
    return runs + [(tokens.im_start, 1), (tokens.im_patch, global_tokens), (tokens.im_end, 1)]


def image_token_ids(
    plan: CropPlan, tokens: ImageTokenIds, global_tokens: int = 169, crop_tokens: int = 81
) -> list[int]:
    """The token string of one image, `num_image_tokens` ids: for one `<im_patch>` of the template."""
    return expand_runs(image_ids_rle(plan, tokens, global_tokens, crop_tokens))


def expand_runs(runs: Sequence[tuple[int, int]]) -> list[int]:
    """(id, count) runs as a plain list of ids."""
    return [token for token, count in runs for _ in range(count)]


def _pad(width: int, height: int, rule: CropRule) -> Size:
    """Only thin, very long images are padded; larger long ones are cut with a smaller window instead."""
    ratio = width / height
    if min(width, height) < rule.pad_below and (ratio > VERY_LONG or ratio < 1 / VERY_LONG):
        return max(width, height), max(width, height)
    return width, height


def _limit(size: Size, max_side: int) -> Size:
    """Scales down to `max_side`, truncating. The product may fall one pixel short, as in the original."""
    longer = max(size)
    if longer <= max_side:
        return size
    scale = max_side / longer
    return int(size[0] * scale), int(size[1] * scale)


def _window(size: Size, rule: CropRule) -> int:
    longer, shorter = max(size), min(size)
    ratio = longer / shorter
    if rule.is_small(longer):
        return shorter if ratio > SQUARE_ENOUGH else 0
    return min(shorter, rule.crop_size) if ratio > VERY_LONG else rule.crop_size


def _snap(side: int, window: int) -> int:
    """Rounds a side to whole windows. A side shorter than the window is kept."""
    ratio = side / window
    if ratio < 1:
        return side
    whole = int(ratio)
    return window * (whole + 1 if ratio - whole > ROUND_UP_ABOVE else whole)
