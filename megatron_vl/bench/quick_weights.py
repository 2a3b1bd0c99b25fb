"""Weights for measurements: of the right size at once, where drawing ten billion numbers would take minutes."""

from __future__ import annotations

import torch

from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.config.model import ModelConfig

BLOCK = 1 << 20


class QuickWeights(FreshWeights):
    """As `FreshWeights`, with the same deviations, but the random numbers repeat after a million."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        super().__init__(model, seed)
        self._block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))

    def __call__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return super().__call__(name)
        count = torch.Size(shape).numel()
        return self._block.repeat(-(-count // BLOCK))[:count].view(shape) * self._std(name, shape)
