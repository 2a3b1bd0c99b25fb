"""The residual connections of the vision tower: a branch comes back scaled per channel, and a norm may follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_vl.ops.library import uses_kernels
from megatron_vl.plan.kernels import WIDEST_NORM


def scale_residual(
    x: torch.Tensor, bias: torch.Tensor, gamma: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """``residual + gamma * (x + bias)``; x and residual ``[..., c]``, bias and gamma ``[c]``."""
    if uses_kernels(x, x.shape[-1]):
        return torch.ops.megatron_vl.scale_residual(x.contiguous(), bias, gamma, residual.contiguous())
    return residual + gamma * (x + bias)


def scale_residual_norm(
    x: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y = residual + gamma * (x + bias)`` and the layer norm of y with ``weight`` and ``shift`` ``[c]``."""
    if uses_kernels(x, x.shape[-1], at_most=WIDEST_NORM):
        y, normed, _, _ = torch.ops.megatron_vl.scale_residual_norm(
            x.contiguous(), bias, gamma, residual.contiguous(), weight, shift, eps
        )
        return y, normed
    y = scale_residual(x, bias, gamma, residual)
    return y, F.layer_norm(y, weight.shape, weight, shift, eps)
