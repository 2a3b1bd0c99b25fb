"""The pixel tensors of an image's views in 8 bits from end to end: mode `fast`.

The stages are those of mode `exact` (`decode.make_views`), but every resize works on 8-bit pixels, by torch's
antialiased bilinear kernel, which uses vector instructions on channels-last bytes; normalising is left to the
model, on the device, of a quarter of the bytes. Torch rounds its weights to 16 bits, Pillow to 22 and more: a
resize differs from Pillow's by one grey level in about one pixel of fifty, and the last one is rounded, which in
the float path it is not. Together at most 2.2 grey levels (tests/data/test_fast_views.py).

Thin images, whose window is smaller than a crop, are resized up to three times. Their first two resizes are
left to Pillow, so that no more than two of torch's follow each other; they are small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from megatron_vl.data.crops import RELEASED, CropPlan, CropRule, Size
from megatron_vl.data.decode import resize_whole, stretch_to_canvas
from megatron_vl.errors import DataError


def make_fast_views(
    pixels: torch.Tensor,
    plan: CropPlan,
    rule: CropRule = RELEASED,
    *,
    crops: Sequence[int] | None = None,
    with_global: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of the views of one image, 8 bits, not normalised: other arguments as `make_views`.

    pixels: uint8 [3, height, width] of the upright image, on any device, best channels last. Returns uint8 on CPU:
    global view [1 or 0, 3, G, G] and crops [n, 3, C, C]; the channels of a pixel lie together in memory (channels
    last), as decoders write them.
    """
    size = (pixels.shape[2], pixels.shape[1])
    if size != plan.size:
        raise DataError(f"the image is {size}, its plan was made for {plan.size}")
    wanted = range(plan.num_crops) if crops is None else crops
    global_pixels = empty_views(int(with_global), rule.global_size)
    crop_pixels = empty_views(len(wanted), rule.crop_size)
    if not with_global and not wanted:
        return global_pixels, crop_pixels
    canvas = None
    if _is_thin(plan, rule):
        picture = resize_whole(Image.fromarray(pixels.permute(1, 2, 0).numpy(force=True)), plan)
        resized = pixels_of(picture)
        if wanted:
            canvas = pixels_of(stretch_to_canvas(picture, plan))
    else:
        resized = _resize_whole(pixels, plan)
        if wanted:
            canvas = resize(resized, plan.canvas)
    if with_global:
        global_pixels[0] = resize(resized, (rule.global_size, rule.global_size))
    if canvas is not None:
        cut(canvas, plan, wanted, crop_pixels)
    return global_pixels, crop_pixels


def _is_thin(plan: CropPlan, rule: CropRule) -> bool:
    """Whether the crops are enlarged after cutting, as those of very long images and of small long ones are."""
    return 0 < plan.window < rule.crop_size


def empty_views(count: int, side: int) -> torch.Tensor:
    """uint8 [count, 3, side, side], channels last, not filled."""
    return torch.empty(count, 3, side, side, dtype=torch.uint8, memory_format=torch.channels_last)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """uint8 [3, height, width] of an RGB image, channels last."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def resize(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """uint8 [3, height, width] resized to `size` (width, height); the same tensor where it has that size."""
    width, height = size
    if pixels.shape[1:] == (height, width):
        return pixels
    if pixels.is_cuda:  # no 8-bit kernel there; never run on a GPU
        return resize_in_float(pixels, size)
    return torch.nn.functional.interpolate(
        pixels[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )[0]


def resize_in_float(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """`resize` in float32, rounded at the end: what a GPU does, within the same tolerance."""
    resized = torch.nn.functional.interpolate(
        pixels[None].to(torch.float32), size=size[::-1], mode="bilinear", antialias=True, align_corners=False
    )
    return resized[0].round_().clamp_(0, 255).to(torch.uint8)


def cut(canvas: torch.Tensor, plan: CropPlan, wanted: Sequence[int], out: torch.Tensor) -> None:
    """Cuts the wanted crops from uint8 [3, height, width] into `out` [n, 3, C, C]; black beyond the canvas."""
    side = out.shape[-1]
    for row, crop in enumerate(wanted):
        left, top, right, bottom = plan.box(crop)
        tile = canvas[:, top:bottom, left:right]
        if tile.shape[1:] != (plan.window, plan.window):
            tile = _on_black(tile, (plan.window, plan.window))
        out[row] = resize(tile, (side, side))


def _resize_whole(pixels: torch.Tensor, plan: CropPlan) -> torch.Tensor:
    """Pads and limits: uint8 [3, height, width] of size `plan.resized`."""
    return resize(_on_black(pixels, plan.padded_size) if plan.padded else pixels, plan.resized)


def _on_black(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """The pixels at the top left of a black canvas of `size` (width, height)."""
    black = torch.zeros(size[1], size[0], 3, dtype=torch.uint8, device=pixels.device).permute(2, 0, 1)
    black[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return black
