"""Which classes fill the slots of a transformer layer: Transformer Engine, or torch.

Chosen once, when the model is built, and printed. Nothing else in the package asks which one it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vl.errors import ConfigError
from megatron_vl.model.attention import TorchCoreAttention
from megatron_vl.model.norm import TorchNorm
from megatron_vl.ops.varlen_attention import use_flash_attention


@dataclass(frozen=True)
class Backend:
    """Classes for the layer slots. ``norm_linear`` fuses a norm with the linear behind it (None: apart)."""

    name: str
    column_linear: Callable
    row_linear: Callable
    norm: Callable
    core_attention: Callable
    norm_linear: Callable | None = None


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can be used here.

    CUDA is asked first and every exception counts as no: an installed but unusable package raises
    RuntimeError, not ImportError, when imported (design/feasibility.md section 2).
    """
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:
        return False
    return True


def choose_backend(name: str, cp_comm_type: str = "p2p", flash_attention: str = "built_in") -> Backend:
    """The backend of ``parallel.layer_backend`` (auto, torch, transformer_engine), and its flash attention.

    Raises:
        ConfigError: transformer_engine is asked for and cannot be used; the torch layers, chosen by auto, cannot do
            what is asked for (plan/attention_checks.py has the rules that follow from the configuration alone).
    """
    usable = have_transformer_engine()
    if name == "transformer_engine" and not usable:
        raise ConfigError(
            "parallel.layer_backend = transformer_engine: it needs a CUDA device and an importable "
            "transformer-engine 2.11; install the extra 'cuda' or use parallel.layer_backend=torch"
        )
    if name == "transformer_engine" or (name == "auto" and usable):
        return _transformer_engine()
    if cp_comm_type == "a2a":
        raise ConfigError(
            "parallel.cp_comm_type = a2a: parallel.layer_backend auto chose the torch layers, which have p2p and "
            "all_gather; use one of the two, or install transformer-engine"
        )
    use_flash_attention(flash_attention)
    return Backend("torch", ColumnParallelLinear, RowParallelLinear, TorchNorm, TorchCoreAttention)


def _transformer_engine() -> Backend:
    from megatron.core.extensions import transformer_engine as te

    return Backend(
        "transformer_engine", te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm,
        te.TEDotProductAttention, te.TELayerNormColumnParallelLinear,
    )  # fmt: skip


def layer_spec(
    backend: Backend, causal: bool, qk_norm: bool, residual: ModuleSpec | Callable | None = None
) -> ModuleSpec:
    """A pre-norm transformer layer.

    residual: what fills the bias-dropout-add slots (default: Megatron-Core's own).
    """
    fused = backend.norm_linear is not None
    first_linear = backend.norm_linear or backend.column_linear
    norm = IdentityOp if fused else backend.norm
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=first_linear,
            core_attention=backend.core_attention,
            linear_proj=backend.row_linear,
            q_layernorm=backend.norm if qk_norm else IdentityOp,
            k_layernorm=backend.norm if qk_norm else IdentityOp,
        ),
    )
    residual = residual or get_bias_dropout_add
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=residual,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=first_linear, linear_fc2=backend.row_linear)
            ),
            mlp_bda=residual,
        ),
    )


def block_spec(layer: ModuleSpec, num_layers: int, backend: Backend) -> TransformerBlockSubmodules:
    """``num_layers`` (of this stage) equal layers and the norm behind the last one."""
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=backend.norm)
