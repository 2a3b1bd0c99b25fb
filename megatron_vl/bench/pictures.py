"""Pictures that cost what photographs cost, drawn from a seed."""

from __future__ import annotations

import io

import torch
from PIL import Image

SURFACES = 24  # rectangles with hard edges


def photo_like(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture with the statistics that a JPEG decoder's time depends on.

    Noise whose amplitude falls with its frequency, as in photographs; surfaces with hard edges; a camera's fine
    noise, in brightness only. At quality 90 a JPEG of it takes about 2 bits per pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    picture, amplitude, divided = torch.full((3, 3, 3), 120.0), 40.0, 1
    while max(width, height) / divided > 4:
        divided *= 2
    while divided >= 1:  # from a few cells to single pixels, each time twice as fine and fainter
        picture = _stretched(picture, -(-height // divided), -(-width // divided))
        bright = torch.randn(1, *picture.shape[1:], generator=generator)
        if divided > 1:
            bright = bright + 0.4 * torch.randn(picture.shape, generator=generator)
        picture += max(amplitude, 4.0) * bright
        divided, amplitude = divided // 2, amplitude * 0.7
    for _ in range(SURFACES):
        top, left, tall, wide = torch.rand(4, generator=generator).tolist()
        rows = slice(int(top * height), int((top + tall / 4) * height))
        columns = slice(int(left * width), int((left + wide / 4) * width))
        picture[:, rows, columns] += 25 * torch.randn(3, 1, 1, generator=generator)
    return Image.fromarray(picture.clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def jpeg(picture: Image.Image, quality: int) -> bytes:
    """The picture as a JPEG file, colour at half the resolution as cameras store it."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def _stretched(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(picture[None], size=(height, width), mode="bilinear")[0]
