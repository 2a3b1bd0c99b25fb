"""The value head: what the critic has in the place of the output projection."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


class ValueHead(torch.nn.Module):
    """One value per token, ``hidden . weight``, in fp32 whatever the format of the weight ``[1, h]``.

    Its input is whole on every tensor-parallel rank, and so is its gradient. With sequence parallelism each rank
    has its own tokens: the values are gathered for the loss, and the parts of the weight's gradient are summed over
    the group by ``finalize_model_grads``, which looks for the mark ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, tp: dist.ProcessGroup) -> None:
        super().__init__()
        self.tp, self.cut = tp, config.sequence_parallel and tp.size() > 1
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.zeros((1, config.hidden_size), dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[S / cp (/ tp), b, h] -> [b, S / cp]`` fp32, equal on every tensor-parallel rank."""
        values = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.cut:  # backward each rank takes its own tokens: every rank has the same loss
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.tp
            )
        return values.squeeze(-1).transpose(0, 1).contiguous()
