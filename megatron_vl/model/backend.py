"""Which classes fill the slots of a transformer layer: Transformer Engine, or torch.

Chosen once, when the model is built, and printed. Nothing else in the package asks which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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

from megatron_vl.config.schema import PrecisionConfig
from megatron_vl.errors import ConfigError
from megatron_vl.model.attention import TorchCoreAttention
from megatron_vl.model.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_vl.model.norm import choose_norm
from megatron_vl.ops.varlen_attention import use_flash_attention
from megatron_vl.plan.fp8 import Fp8Layers, fp8_layers, refusal


@dataclass(frozen=True)
class Backend:
    """Classes for the layer slots. ``norm_linear`` fuses a norm with the linear behind it (None: apart). fp8: layers
    whose linears are replaced (Transformer Engine's change themselves, as their ``TransformerConfig`` says)."""

    name: str
    column_linear: Callable
    row_linear: Callable
    norm: Callable
    core_attention: Callable
    norm_linear: Callable | None = None
    fp8: Fp8Layers | None = None


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


def choose_backend(
    name: str, cp_comm_type: str = "p2p", flash_attention: str = "built_in", norms: str = "auto"
) -> Backend:
    """The backend of ``parallel.layer_backend`` (auto, torch, transformer_engine), its flash attention and norms.

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
        if norms == "apex":
            raise ConfigError(
                "parallel.norms = apex: Transformer Engine's layers have norms of their own; use auto, or "
                "parallel.layer_backend=torch"
            )
        return _transformer_engine()
    if cp_comm_type == "a2a":
        raise ConfigError(
            "parallel.cp_comm_type = a2a: parallel.layer_backend auto chose the torch layers, which have p2p and "
            "all_gather; use one of the two, or install transformer-engine"
        )
    use_flash_attention(flash_attention)
    return Backend("torch", ColumnParallelLinear, RowParallelLinear, choose_norm(norms), TorchCoreAttention)


def _transformer_engine() -> Backend:
    from megatron.core.extensions import transformer_engine as te

    return Backend(
        "transformer_engine", te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm,
        te.TEDotProductAttention, te.TELayerNormColumnParallelLinear,
    )  # fmt: skip


def in_fp8(backend: Backend, precision: PrecisionConfig, num_layers: int, device: torch.device) -> Backend:
    """The backend with what ``precision.fp8`` asks for. num_layers: of the decoder.

    Raises:
        ConfigError: backend or device cannot do it.
    """
    layers = fp8_layers(precision, num_layers)
    if layers is None:
        return backend
    on_gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_gpu else None
    cuda = torch.version.cuda and tuple(int(n) for n in torch.version.cuda.split(".")[:2])
    why_not = refusal(precision, backend.name, capability, cuda)
    if why_not is not None:
        raise ConfigError(why_not)
    return replace(backend, fp8=layers) if backend.name == "torch" else backend


def layer_spec(
    backend: Backend,
    causal: bool,
    qk_norm: bool,
    residual: ModuleSpec | Callable | None = None,
    fp8: bool = False,
) -> ModuleSpec:
    """A pre-norm transformer layer.

    residual: what fills the bias-dropout-add slots (default: Megatron-Core's own). fp8: with the linears of
    ``backend.fp8``.
    """
    fused = backend.norm_linear is not None
    column, row = backend.column_linear, backend.row_linear
    if fp8:
        recipe = {"recipe": backend.fp8.recipe}
        column, row = ModuleSpec(Fp8ColumnParallelLinear, recipe), ModuleSpec(Fp8RowParallelLinear, recipe)
    first_linear = backend.norm_linear or column
    norm = IdentityOp if fused else backend.norm
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=first_linear,
            core_attention=backend.core_attention,
            linear_proj=row,
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
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=first_linear, linear_fc2=row)),
            mlp_bda=residual,
        ),
    )


def decoder_spec(numbers: Sequence[int], backend: Backend) -> TransformerBlockSubmodules:
    """The decoder layers of a stage, by their global numbers, and the norm behind the last one."""
    quantised = backend.fp8.decoder if backend.fp8 is not None else ()
    layers = [layer_spec(backend, causal=True, qk_norm=True, fp8=number in quantised) for number in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.norm)
