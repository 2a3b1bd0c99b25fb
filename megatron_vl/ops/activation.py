"""Activations of the vision tower."""

from __future__ import annotations

import torch


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(1.702 x)``, any shape and floating dtype.

    The released STEP3-VL tower uses this one where Meta's Perception Encoder has GELU. Megatron-Core's own
    ``quick_gelu`` is wrapped in ``torch.compile``, which costs seconds at the first CPU step.
    """
    return x * torch.sigmoid(1.702 * x)
