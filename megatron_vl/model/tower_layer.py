"""A block of the vision tower: Megatron-Core's layer, its element-wise parts through ``ops/``.

Its linears, norms and core attention are called as Megatron-Core's own forward pass would call them; what lies between
(rotary embedding, bias and activation, layer scale with residual and norm) goes through one operation each.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_vl.model.backend import Backend, layer_spec
from megatron_vl.model.norm import LayerNorm
from megatron_vl.ops.activation import bias_quick_gelu
from megatron_vl.ops.residual import scale_residual, scale_residual_norm
from megatron_vl.ops.rotary import rope_2d


class LayerScaleResidual(torch.nn.Module):
    """``residual + gamma * (x + bias)`` in Megatron-Core's bias-dropout-add slot; gamma is per channel."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype))

    def forward(self, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x, residual: ``[s, b, h]``; bias: ``[h]``, that of the linear layer before."""
        return scale_residual(x, bias, self.gamma, residual)

    def with_norm(
        self, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm: torch.nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and ``norm`` of it. The norm of Transformer Engine layers is part of their next linear."""
        if isinstance(norm, LayerNorm):
            return scale_residual_norm(x, bias, self.gamma, residual, norm.weight, norm.bias, norm.eps)
        hidden = self(x, bias, residual)
        return hidden, norm(hidden)


class TowerLayer(TransformerLayer):
    """Pre-norm block with full attention, RoPE-2D and layer scale; heads and MLP may be cut over TP."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        **rest: Any,
    ) -> tuple[torch.Tensor, None]:
        """``[patches, views, h] -> [patches, views, h]``.

        rotary_pos_emb: ``ops.rotary.rotary_table``. rest: what Megatron-Core's block has for other models, all None.
        """
        assert attention_mask is None and not any(value is not None for value in rest.values())
        branch, bias = self._attend(self.input_layernorm(hidden_states), rotary_pos_emb)
        hidden, normed = self.self_attn_bda.with_norm(branch, bias, hidden_states, self.pre_mlp_layernorm)
        inner, inner_bias = self.mlp.linear_fc1(normed)
        branch, bias = self.mlp.linear_fc2(bias_quick_gelu(inner, inner_bias))
        return self.mlp_bda(branch, bias, hidden), None

    def read_without_call(self) -> list[torch.nn.Parameter]:
        """Weights that `forward` reads without a call of their modules: layer scale and norm are one operation."""
        return [*self.self_attn_bda.parameters(), *self.pre_mlp_layernorm.parameters()]

    def _attend(self, normed: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of the attention's last linear layer, and its bias, which is not added yet."""
        attention = self.self_attention
        mixed, _ = attention.linear_qkv(normed)
        heads = attention.num_attention_heads_per_partition
        query, key, value = rope_2d(mixed.unflatten(-1, (heads, -1)), table)
        out = attention.core_attention(query, key, value, None, attn_mask_type=attention.attn_mask_type)
        return attention.linear_proj(out)


def tower_spec(
    num_layers: int, backend: Backend, width: int, dtype: torch.dtype
) -> TransformerBlockSubmodules:
    """The blocks of a tower of this width, and a norm that it has no use for."""
    scale = ModuleSpec(LayerScaleResidual, params={"hidden_size": width, "dtype": dtype})
    fp8 = backend.fp8 is not None and backend.fp8.vision
    layer = layer_spec(backend, causal=False, qk_norm=False, residual=scale, fp8=fp8)
    layer.module = TowerLayer
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=backend.norm)
