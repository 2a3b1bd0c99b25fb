"""``TransformerConfig`` objects of decoder and tower, made from the description of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import ParallelConfig, RecomputeConfig
from megatron_vl.ops.activation import quick_gelu
from megatron_vl.plan.rope import attention_scale
from megatron_vl.plan.stages import Stage, to_megatron_layout

NO_FP8: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Numerics:
    """dtype of weights and activations, and whether weights are made on the CPU."""

    dtype: torch.dtype
    on_cpu: bool


def _common(numerics: Numerics) -> dict:
    """What decoder and tower share. Weights are drawn by ``checkpoint/initialize.py``, equal in every layout.

    Fusions that go through ``torch.compile`` stay off; the 3-tuple loss contract needs
    ``calculate_per_token_loss``.
    """
    return dict(
        params_dtype=numerics.dtype,
        pipeline_dtype=numerics.dtype,
        bf16=numerics.dtype == torch.bfloat16,
        use_cpu_initialization=numerics.on_cpu,
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        batch_p2p_sync=False,
        calculate_per_token_loss=True,
    )


def decoder_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    numerics: Numerics,
    stages: list[list[Stage]],
    fp8: Mapping[str, Any] = NO_FP8,
) -> TransformerConfig:
    """The Qwen3 decoder; its pipeline stages are the plan's. fp8: ``plan.fp8.transformer_config_fields``."""
    text, pp = model.text, parallel.pipeline_model_parallel_size
    layout = PipelineParallelLayerLayout(to_megatron_layout(stages), pp) if pp > 1 else None
    interleaved = parallel.chunks_per_stage > 1
    granularity = None if recompute.decoder == "none" else recompute.decoder
    return TransformerConfig(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_query_groups,
        kv_channels=text.kv_channels,
        ffn_hidden_size=text.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=text.layernorm_epsilon,
        qk_layernorm=True,
        softmax_scale=attention_scale(text.kv_channels, text.rope_scaling),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        # Interleaved, two stages are each other's next and previous at once. A batched exchange pairs their sends
        # and receives by order alone and swaps activations with gradients; separate ones use a group per direction.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        pipeline_model_parallel_layout=layout,
        recompute_granularity=granularity,
        recompute_method="uniform" if granularity == "full" else None,
        recompute_num_layers=recompute.decoder_num_layers if granularity == "full" else None,
        **fp8,
        **_common(numerics),
    )


def vision_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    numerics: Numerics,
    fp8: Mapping[str, Any] = NO_FP8,
) -> TransformerConfig:
    """The PE-lang tower: whole on every rank in placement ``data``, sharded over TP in placement ``tensor``.

    Its recompute setting is its own. Pipeline and context parallelism do not exist inside the tower.
    """
    vision = model.vision
    full = recompute.vision == "full"
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        kv_channels=vision.head_dim,
        ffn_hidden_size=vision.ffn_hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=quick_gelu,
        add_bias_linear=True,
        rotary_interleaved=True,
        tensor_model_parallel_size=(
            parallel.tensor_model_parallel_size if parallel.vision_placement == "tensor" else 1
        ),
        recompute_granularity="full" if full else None,
        recompute_method="uniform" if full else None,
        recompute_num_layers=recompute.vision_num_layers if full else None,
        **fp8,
        **_common(numerics),
    )
