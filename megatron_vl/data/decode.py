"""From an image file to the pixel tensors of its views, with Pillow and torch: mode `exact`.

The order of operations is part of the model: orientation, RGB, padding and the two resizes happen on 8-bit
pixels with Pillow's bilinear filter; rescaling and normalisation come before the last resize, which works in
float32 with torch's antialiased bilinear filter (the kernel of torchvision's Resize). Aspect ratio is not
kept by that last resize. Source: the released processing code; bit-equal to vLLM's processor on the golden
pictures. Mode `fast` is in `fast_views.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from PIL.Image import Resampling, Transpose
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from megatron_vl.config.model import CLIP_MEAN, CLIP_STD
from megatron_vl.data.crops import RELEASED, CropPlan, CropRule
from megatron_vl.data.image_checks import ImageSource, damaged, open_image, open_source
from megatron_vl.errors import DataError, ImageRefused

# EXIF orientation -> the turn that makes the image upright
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_SIDES_SWAPPED = (5, 6, 7, 8)


@dataclass(frozen=True)
class DecodeRule:
    """What is done to a file before its pixels count.

    alpha: `white` lays transparent images over white (vLLM), `drop` keeps colour, not alpha (transformers).
    apply_exif: turn the image upright first. TIFF has its own orientation tag, which is always applied.
    max_pixels: larger images are refused unread.
    clip_high_depth_grey: grey of more than 8 bits is converted as by the reference, which sets every value
        above 255 to white; False refuses such images, since little is left of them.
    """

    alpha: str = "white"
    apply_exif: bool = True
    max_pixels: int = 178_956_970
    clip_high_depth_grey: bool = False

    def __post_init__(self) -> None:
        assert self.alpha in ("white", "drop"), self.alpha


@dataclass(frozen=True)
class ImageHeader:
    """What a file says about its image before any pixel is decoded.

    format, mode: Pillow's names. stored_size: (width, height) of the stored pixels, size: after `apply_exif`.
    orientation: EXIF, 1 = upright. has_alpha: an alpha channel or a transparent colour.
    """

    format: str
    mode: str
    stored_size: tuple[int, int]
    orientation: int
    size: tuple[int, int]
    has_alpha: bool

    @property
    def is_high_depth_grey(self) -> bool:
        """Grey of 16 or 32 bits, or floating point. (RGB of 16 bits is scaled down properly.)"""
        return self.mode.startswith(("I", "F"))


def read_header(source: ImageSource, rule: DecodeRule = DecodeRule()) -> ImageHeader:
    """Format, mode, size and orientation of an image file, without decoding it.

    source: a path, or the bytes of a file. Errors: `ImageRefused`, all codes of `image_checks.REASONS` that a
    header can show. A readable header does not promise readable pixels.
    """
    with open_source(source) as file:
        return _header(open_image(file, rule.max_pixels), rule)


def load_rgb(source: ImageSource, rule: DecodeRule = DecodeRule()) -> Image.Image:
    """The upright 8-bit RGB image of a file, of size `read_header(source, rule).size`.

    Errors: `ImageRefused` as `read_header`, and `truncated`, `corrupt`, `unsupported_mode`. `DataError` when
    this process has told Pillow to fill truncated images with grey.
    """
    with open_source(source) as file:
        image = open_image(file, rule.max_pixels)
        header = _header(image, rule)
        _load(image)
        turn = _UPRIGHT.get(header.orientation) if rule.apply_exif and header.format != "TIFF" else None
        upright = image.transpose(turn) if turn is not None else image
        if upright.size != header.size:
            raise ImageRefused("corrupt", f"the header says {header.size}, the pixels {upright.size}")
        return to_rgb(upright, rule.alpha)


def make_views(
    rgb: Image.Image,
    plan: CropPlan,
    rule: CropRule = RELEASED,
    *,
    crops: Sequence[int] | None = None,
    with_global: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of the views of one image, normalised, mode `exact`.

    rgb: from `load_rgb`. plan: from `plan_crops` with the same `rule`. crops: indices of the wanted crops,
    None = all; a rank asks for its own only. Returns float32 on CPU: global view [1 or 0, 3, G, G] and crops
    [n, 3, C, C] in the order asked for.
    """
    wanted = range(plan.num_crops) if crops is None else crops
    global_pixels = torch.empty(int(with_global), 3, rule.global_size, rule.global_size)
    crop_pixels = torch.empty(len(wanted), 3, rule.crop_size, rule.crop_size)
    if not with_global and not wanted:
        return global_pixels, crop_pixels
    resized = resize_whole(rgb, plan)
    if with_global:
        view_pixels(resized, rule.global_size, out=global_pixels[0])
    if wanted:
        canvas = stretch_to_canvas(resized, plan)
        for row, crop in enumerate(wanted):
            view_pixels(canvas.crop(plan.box(crop)), rule.crop_size, out=crop_pixels[row])
    return global_pixels, crop_pixels


def resize_whole(rgb: Image.Image, plan: CropPlan) -> Image.Image:
    """Pads and limits the image: 8-bit RGB of size `plan.resized`, the source of all views."""
    if rgb.size != plan.size:
        raise DataError(f"the image is {rgb.size}, its plan was made for {plan.size}")
    if plan.padded:
        square = Image.new("RGB", plan.padded_size)
        square.paste(rgb)
        rgb = square
    return rgb if rgb.size == plan.resized else rgb.resize(plan.resized, Resampling.BILINEAR)


def stretch_to_canvas(resized: Image.Image, plan: CropPlan) -> Image.Image:
    """8-bit RGB of size `plan.canvas`, which `plan.box(i)` cuts. Pillow fills beyond it with black."""
    assert plan.canvas is not None, "an image without crops has no canvas"
    return resized if resized.size == plan.canvas else resized.resize(plan.canvas, Resampling.BILINEAR)


def view_pixels(picture: Image.Image, side: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """One view of 8-bit RGB as float32 [3, side, side], in `out` if given.

    Normalising before resizing is the released order. One channel at a time: its plane stays in the cache.
    """
    out = torch.empty(3, side, side) if out is None else out
    for channel, band in enumerate(picture.split()):
        pixels = torch.from_numpy(np.array(band))
        if picture.size == (side, side):
            plane = torch.div(pixels, 255, out=out[channel])
            plane.sub_(CLIP_MEAN[channel]).div_(CLIP_STD[channel])
            continue
        plane = pixels.to(torch.float32).div_(255).sub_(CLIP_MEAN[channel]).div_(CLIP_STD[channel])
        out[channel] = torch.nn.functional.interpolate(
            plane[None, None], size=(side, side), mode="bilinear", antialias=True, align_corners=False
        )[0, 0]
    return out


def _header(image: ImageFile.ImageFile, rule: DecodeRule) -> ImageHeader:
    orientation = _orientation(image)
    swapped = orientation in _SIDES_SWAPPED
    stored, applied = image.size, rule.apply_exif
    if isinstance(
        image, TiffImageFile
    ):  # Pillow turns TIFF by itself, and may report the upright size already
        stored, applied = (image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]), True
    size = stored[::-1] if swapped and applied else stored
    header = ImageHeader(str(image.format), image.mode, stored, orientation, size, _has_alpha(image))
    if header.is_high_depth_grey and not rule.clip_high_depth_grey:
        raise ImageRefused(
            "high_depth_grey",
            f"mode {image.mode}: values above 255 would become white; convert the file to 8 bits",
        )
    return header


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation, 1 when there is none or it cannot be read, as in vLLM."""
    if image.format == "PNG" and _png_text_after_pixels(image):
        _load(image)  # Pillow reads these chunks together with the pixels only
    try:
        # not image.getexif(): for PNG that decodes the pixels
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # malformed EXIF raises errors of many types and says nothing about the pixels
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _load(image: ImageFile.ImageFile) -> None:
    """Decodes the pixels. Errors: `DataError` and `ImageRefused` as in `load_rgb`."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated images would be filled with grey "
            "unnoticed; leave it False in processes that load training images"
        )
    try:
        image.load()
    except Exception as error:  # decoders meet damaged bytes with any type of error
        raise damaged(error) from error


def _png_text_after_pixels(image: ImageFile.ImageFile) -> bool:
    """Whether a PNG has EXIF or text chunks behind its pixels. Leaves the file as it was."""
    file = image.fp
    position = file.tell()
    try:
        file.seek(8)
        seen_pixels = False
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            if kind == b"IDAT":
                seen_pixels = True
            elif seen_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
        return False
    finally:
        file.seek(position)


def _has_alpha(image: Image.Image) -> bool:
    """An alpha channel, or one colour declared transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def to_rgb(image: Image.Image, alpha: str) -> Image.Image:
    """8-bit RGB of an image of any mode; alpha: see `DecodeRule`. Errors: `ImageRefused` `unsupported_mode`."""
    try:
        if not _has_alpha(image):
            return image if image.mode == "RGB" else image.convert("RGB")  # no copy of what is RGB already
        # through RGBA in both cases: Pillow drops a transparent palette entry only that way without a warning
        rgba = image.convert("RGBA")
        if alpha == "drop":
            return rgba.convert("RGB")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    except ValueError as error:  # Pillow knows no way from this mode
        raise ImageRefused("unsupported_mode", f"mode {image.mode}: {error}") from error
