"""Norms that work with sequence parallelism on any device.

Megatron-Core's ``WrappedTorchNorm`` refuses sequence parallelism; these mark their weights so that
``finalize_model_grads`` sums the gradients over the tensor-parallel group.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; the mean is taken in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """Standard layer norm with bias over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class TorchNorm:
    """Builds the norm that ``config.normalization`` names (the slot wants one class for both)."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
        return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization](config, hidden_size, eps)
