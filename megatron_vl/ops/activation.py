"""Activations of the vision tower."""

from __future__ import annotations

import torch

from megatron_vl.ops.library import uses_kernels


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(1.702 x)``, any shape and floating dtype.

    The released STEP3-VL tower uses this one where Meta's Perception Encoder has GELU. Megatron-Core's own
    ``quick_gelu`` is wrapped in ``torch.compile``, which costs seconds at the first CPU step.
    """
    return x * torch.sigmoid(1.702 * x)


def bias_quick_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``quick_gelu(x + bias)``, x ``[..., c]``, bias ``[c]``; the kernel keeps x alone for the backward pass."""
    if uses_kernels(x, x.shape[-1]):
        return torch.ops.megatron_vl.bias_quick_gelu(x.contiguous(), bias)
    return quick_gelu(x + bias)
