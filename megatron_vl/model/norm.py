"""Norms that work with sequence parallelism on any device.

Megatron-Core's ``WrappedTorchNorm`` refuses sequence parallelism; these mark their weights so that
``finalize_model_grads`` sums the gradients over the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.errors import ConfigError


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


class ApexNorm:
    """The same from NVIDIA Apex's fused kernels (never run). Megatron-Core's own way to Apex, ``FusedLayerNorm``,
    refuses RMSNorm, which is what the decoder has; here each kind gets its class."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
        from apex.normalization import FusedLayerNorm, FusedRMSNorm

        made = {"RMSNorm": FusedRMSNorm, "LayerNorm": FusedLayerNorm}[config.normalization](
            hidden_size, eps=eps
        )
        made.to(config.params_dtype)
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return made


def have_apex_norms() -> bool:
    """Whether Apex's fused norms can be used: NVIDIA's package with its extensions built, and a CUDA device.

    The package of that name on PyPI is other software; every exception counts as no.
    """
    if not torch.cuda.is_available():
        return False
    try:
        import fused_layer_norm_cuda  # noqa: F401
        from apex.normalization import FusedLayerNorm, FusedRMSNorm  # noqa: F401
    except Exception:
        return False
    return True


def torch_fuses_rms_norm() -> bool:
    """Whether PyTorch has a kernel of its own for an RMS norm: then Apex has nothing to add."""
    return hasattr(torch.ops.aten, "_fused_rms_norm")


def choose_norm(name: str) -> Callable[..., torch.nn.Module]:
    """The norm of the torch layers for ``parallel.norms`` (auto, torch, apex).

    Raises:
        ConfigError: apex is asked for and cannot be used.
    """
    usable = name != "torch" and have_apex_norms()
    if name == "apex" and not usable:
        raise ConfigError(
            "parallel.norms = apex: it needs a CUDA device and NVIDIA's Apex, built from source with its CUDA "
            "extensions; use auto"
        )
    return ApexNorm if name == "apex" or (usable and not torch_fuses_rms_norm()) else TorchNorm
