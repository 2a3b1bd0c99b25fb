"""The tower's two stride-2 convolutions, cut over tensor-parallel ranks as Megatron-Core cuts its linears.

Weights are those of a linear over windows: ``[out, in * 9]``, the released ``[out, in, 3, 3]`` flattened. The first
is cut by output channels, the second by input channels, so that the channels in between stay where they are. What is
exchanged are tokens, not windows: 4/9 of the bytes.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.ops.projector import TAPS, downsample


class FirstDownsampler(ColumnParallelLinear):
    """``[g * g, n, channels] -> [ceil(g / 2)^2, n, out / tp]``, with bias."""

    def __init__(self, channels: int, out: int, config: TransformerConfig, tp_group) -> None:
        super().__init__(
            TAPS * channels,
            out,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            tp_group=tp_group,
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = copy_to_tensor_model_parallel_region(tokens, group=self.tp_group)
        return downsample(tokens, self.weight, self.bias)


class SecondDownsampler(RowParallelLinear):
    """``[g * g, n, channels / tp] -> [ceil(g / 2)^2, n, out]``, with bias, whole on every rank of the group."""

    def __init__(self, channels: int, out: int, config: TransformerConfig, tp_group) -> None:
        super().__init__(
            TAPS * channels,
            out,
            config=config,
            init_method=config.init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=tp_group,
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.tp_group.size() == 1:
            return downsample(tokens, self.weight, self.bias)
        partial = downsample(tokens, self.weight, None)
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group) + self.bias
