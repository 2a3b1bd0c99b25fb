"""RoPE-2D of the vision tower, on queries and keys together (spec/model.md 2.1)."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_vl.ops.library import uses_kernels


@lru_cache(maxsize=8)
def rotary_angles(grid: int, head_dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Angles of RoPE-2D, fp32 ``[grid * grid, 1, 1, head_dim]``, patches in row-major order.

    The first half of the head follows the column, the second half the row; within a half each angle stands
    twice, for an adjacent pair. Positions are integers, never rescaled (spec/model.md 2.1).
    """
    half = head_dim // 2
    inv_freq = base ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    per_position = (torch.arange(grid, dtype=torch.float64)[:, None] * inv_freq).repeat_interleave(2, dim=-1)
    column = per_position[None, :, :].expand(grid, grid, half)
    row = per_position[:, None, :].expand(grid, grid, half)
    angles = torch.cat([column, row], dim=-1).reshape(grid * grid, 1, 1, head_dim)
    return angles.to(device=device, dtype=torch.float32)


@lru_cache(maxsize=8)
def rotary_table(grid: int, head_dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Cosine and sine of every adjacent pair of channels, fp32 ``[grid * grid, head_dim / 2, 2]``."""
    angles = rotary_angles(grid, head_dim, base, device)[:, 0, 0, ::2]
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rope_2d(qkv: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries, rotated keys, and values, each ``[s, b, heads, d]``.

    qkv: ``[s, b, heads, 3 d]``, queries, keys and values of a head one after the other. table: ``rotary_table``. The
    kernel lays the results out view by view, as attention takes them.
    """
    if uses_kernels(qkv, qkv.shape[-1] // 3):
        apart = torch.ops.megatron_vl.rope_2d(qkv.contiguous(), table)
        return tuple(x.transpose(0, 1) for x in apart)
    query, key, value = qkv.chunk(3, dim=-1)
    cosine, sine = table.to(qkv.dtype)[:, None, None].unbind(-1)
    return _rotated(query, cosine, sine), _rotated(key, cosine, sine), value


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2)
