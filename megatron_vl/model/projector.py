"""The linear layer from downsampled features to the decoder's width (``vit_large_projector``, no bias)."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class Projector(MegatronModule):
    """``[tokens, n, 4 * width] -> [tokens, n, hidden]``, whole on every rank of ``tp_group``."""

    def __init__(self, config: TransformerConfig, output_size: int, tp_group) -> None:
        super().__init__(config)
        self.linear = ColumnParallelLinear(
            4 * config.hidden_size,
            output_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=True,
            tp_group=tp_group,
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)[0]
