"""The released preprocessing written out plainly: the baseline that `bench/images.py` measures against.

Every view goes the way of the release: an 8-bit Pillow picture, a float tensor in 0 ... 1, normalised, resized with
antialiasing, stacked. Nothing is shared with `data/decode.py` but the boxes of the crop plan.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps

from megatron_vl.data.crops import CropPlan

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def decoded(data: bytes) -> Image.Image:
    """Step 0: upright RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def in_8_bits(image: Image.Image, plan: CropPlan) -> list[Image.Image]:
    """Steps 1 to 7: the global view's source, then the crops, as Pillow pictures."""
    if plan.padded:
        square = Image.new("RGB", plan.padded_size)
        square.paste(image, (0, 0))
        image = square
    if image.size != plan.resized:
        image = image.resize(plan.resized, Image.Resampling.BILINEAR)
    if plan.canvas is None:
        return [image]
    canvas = image if image.size == plan.canvas else image.resize(plan.canvas, Image.Resampling.BILINEAR)
    return [image, *(canvas.crop(plan.box(crop)) for crop in range(plan.num_crops))]


def in_float(
    pictures: list[Image.Image], global_size: int, crop_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 9: float32 [1, 3, G, G] and [n, 3, C, C]."""
    whole, *crops = pictures
    tiles = [_tensor(crop, crop_size) for crop in crops]
    none = torch.empty(0, 3, crop_size, crop_size)
    return torch.stack([_tensor(whole, global_size)]), torch.stack(tiles) if tiles else none


def _tensor(picture: Image.Image, side: int) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    pixels = pixels.to(torch.float32).div(255).sub(MEAN).div_(STD)  # as many copies as torchvision makes
    if pixels.shape[1:] == (side, side):
        return pixels
    size = (side, side)
    return torch.nn.functional.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
