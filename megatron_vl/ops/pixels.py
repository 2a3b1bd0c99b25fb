"""Pixels as bytes, normalised where the model runs."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_vl.config.model import CLIP_MEAN, CLIP_STD


def normalised(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Views ``[n, 3, H, W]`` as the patch embedding takes them.

    Bytes (``data.image_mode`` fast) are normalised here, in fp32 whatever ``dtype`` is, in the order of the released
    processing; floats are normalised already.
    """
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    mean, std = _mean_and_std(pixels.device)
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)


@lru_cache(maxsize=8)
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 ``[3, 1, 1]`` each; kept, because making them waits for the device."""
    return tuple(
        torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD)
    )
