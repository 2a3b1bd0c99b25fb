"""Pixels as bytes, normalised where the model runs, and cut into patches."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_vl.config.model import CLIP_MEAN, CLIP_STD
from megatron_vl.ops.library import PACK_BYTES, uses_kernels


def embedding_patches(pixels: torch.Tensor, like: torch.Tensor, patch: int) -> torch.Tensor:
    """Normalised patches as the patch embedding takes them: ``[(H / patch) * (W / patch), n, 3 * patch * patch]``.

    pixels: ``[n, 3, H, W]``, floats that are normalised, or bytes. like: the weight of the embedding, whose dtype the
    result has.
    """
    if pixels.dtype == torch.uint8 and patch % 2 == 0 and uses_kernels(like, PACK_BYTES):
        mean, std = _mean_and_std(pixels.device)
        bfloat16 = like.dtype == torch.bfloat16
        return torch.ops.megatron_vl.patchify(pixels.contiguous(), mean.view(3), std.view(3), patch, bfloat16)
    return patchify(normalised(pixels, like.dtype), patch)


def normalised(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Views ``[n, 3, H, W]`` as the model takes them.

    Bytes (``data.image_mode`` fast) are normalised here, in fp32 whatever ``dtype`` is, in the order of the released
    processing; floats are normalised already.
    """
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    mean, std = _mean_and_std(pixels.device)
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)


def patchify(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """``[n, 3, H, W] -> [(H / patch) * (W / patch), n, 3 * patch * patch]``, channels then rows then columns."""
    n, c, height, width = pixels.shape
    x = pixels.reshape(n, c, height // patch, patch, width // patch, patch)
    return x.permute(2, 4, 0, 1, 3, 5).reshape(-1, n, c * patch * patch)


@lru_cache(maxsize=8)
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 ``[3, 1, 1]`` each; kept, because making them waits for the device."""
    return tuple(
        torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD)
    )
