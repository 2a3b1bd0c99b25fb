"""FP8: which layers, which recipe, what Megatron-Core is told about it, and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import ParallelConfig, PrecisionConfig, RunConfig
from megatron_vl.errors import Problem

MULTIPLE = 16  # of both dimensions of every product: a rule of the tensor cores
TORCH_CAPABILITY = (8, 9)  # Ada; 9.0 is Hopper
BLOCKWISE_CAPABILITY, BLOCKWISE_CUDA = (9, 0), (12, 9)


@dataclass(frozen=True)
class Fp8Recipe:
    """How a tensor becomes FP8: one scale for all of it, so that its largest value is the largest FP8 value.

    kind: ``tensorwise`` measures the tensor itself; ``delayed`` takes what earlier steps have measured; ``blockwise``
    (Transformer Engine only) has a scale per block. format: ``hybrid`` = e4m3, gradients e5m2; ``e4m3`` = e4m3 alone.
    margin, history, compute: of ``delayed``; the scale is divided by 2^margin, history is in steps.
    """

    kind: str
    format: str
    margin: int = 0
    history: int = 1024
    compute: str = "max"

    @property
    def delayed(self) -> bool:
        return self.kind == "delayed"


@dataclass(frozen=True)
class Fp8Layers:
    """Which layers have FP8 products. decoder: global numbers. vision: the blocks of the tower too."""

    recipe: Fp8Recipe
    decoder: frozenset[int]
    vision: bool


def fp8_layers(precision: PrecisionConfig, num_layers: int) -> Fp8Layers | None:
    """What the configuration asks for; None = no FP8. num_layers: of the decoder."""
    if precision.fp8 == "none":
        return None
    recipe = Fp8Recipe(
        precision.fp8,
        precision.fp8_format,
        precision.fp8_margin,
        precision.fp8_amax_history_len,
        precision.fp8_amax_compute_algo,
    )
    first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return Fp8Layers(recipe, frozenset(range(first, num_layers - last)), precision.fp8_vision)


def transformer_config_fields(precision: PrecisionConfig, vision: bool = False) -> dict[str, Any]:
    """Fields of Megatron-Core 0.16.1's ``TransformerConfig`` for Transformer Engine; empty = no FP8.

    vision: those of the tower, all of whose blocks are treated alike.
    """
    if precision.fp8 == "none" or (vision and not precision.fp8_vision):
        return {}
    fields: dict[str, Any] = {"fp8": precision.fp8_format, "fp8_recipe": precision.fp8}
    if precision.fp8 == "delayed":
        fields |= {
            "fp8_margin": precision.fp8_margin,
            "fp8_amax_history_len": precision.fp8_amax_history_len,
            "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        }
    first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    if (first or last) and not vision:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": first,
            "num_layers_at_end_in_bf16": last,
        }
    return fields


def refusal(
    precision: PrecisionConfig,
    backend: str,
    capability: tuple[int, int] | None,
    cuda: tuple[int, int] | None = None,
) -> str | None:
    """Why the device cannot do what is asked for; None = it can.

    backend: ``torch`` or ``transformer_engine``. capability: of the GPU, None on a CPU, where the torch layers compute
    FP8 by its definition. cuda: version that torch was built with.
    """
    kind = precision.fp8
    if kind == "none":
        return None
    if backend == "torch" and kind == "blockwise":
        return (
            "precision.fp8 = blockwise: the torch layers have one scale per tensor; use tensorwise or delayed, or "
            "install transformer-engine"
        )
    if capability is None:
        return None
    shown = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < TORCH_CAPABILITY:
        return (
            f"precision.fp8 = {kind}: needs compute capability 8.9 (Ada, Hopper) or newer, {shown}; use none"
        )
    if kind == "blockwise" and (capability < BLOCKWISE_CAPABILITY or (cuda or (0, 0)) < BLOCKWISE_CUDA):
        have = "none" if cuda is None else f"{cuda[0]}.{cuda[1]}"
        return (
            f"precision.fp8 = blockwise: needs compute capability 9.0 and CUDA 12.9, {shown} and CUDA is {have}; use "
            "tensorwise"
        )
    return None


def check_fp8(config: RunConfig) -> Iterator[Problem]:
    """What the configuration alone rules out."""
    precision, parallel = config.precision, config.parallel
    if precision.fp8 == "none":
        yield from _without_fp8(precision)
        return
    only_torch = parallel.layer_backend == "torch" or parallel.device == "cpu"
    if precision.params == "fp32" and parallel.device != "cpu":
        yield Problem("precision.fp8", precision.fp8, "needs bf16 weights", "set precision.params bf16")
    if precision.fp8 == "blockwise" and only_torch:
        yield Problem(
            "precision.fp8",
            "blockwise",
            "the torch layers have one scale per tensor",
            "use tensorwise or delayed",
        )
    yield from _layers(config, only_torch)
    if precision.fp8 == "delayed" and precision.fp8_vision and not only_torch:
        yield Problem(
            "precision.fp8_vision",
            True,
            "with delayed, Transformer Engine's ranks agree on the largest values behind every pass of the tower, and "
            "a rank without images has none",
            "use tensorwise, or parallel.layer_backend torch",
        )
    for path, value, size, what in _dimensions(config):
        if size % MULTIPLE:
            yield Problem(
                path,
                value,
                f"precision.fp8 needs {what}, {size}, to be a multiple of {MULTIPLE}",
                "choose another, or fp8 none",
            )


def _without_fp8(precision: PrecisionConfig) -> Iterator[Problem]:
    for name in ("fp8_vision", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(precision, name):
            yield Problem(
                f"precision.{name}",
                getattr(precision, name),
                "says nothing without precision.fp8",
                "leave it out",
            )


def _layers(config: RunConfig, only_torch: bool) -> Iterator[Problem]:
    precision, layers = config.precision, config.model.text.num_layers
    first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    if first + last > layers:
        yield Problem(
            "precision.num_layers_at_start_in_bf16",
            first,
            f"with num_layers_at_end_in_bf16 = {last} there are more than model.text.num_layers = {layers}",
            "lower one of them, or set fp8 none",
        )
    if only_torch or not first + last:
        return
    if precision.fp8 == "delayed":
        yield Problem(
            "precision.num_layers_at_start_in_bf16" if first else "precision.num_layers_at_end_in_bf16",
            first or last,
            "Megatron-Core has no bf16 layers beside delayed scaling on Transformer Engine",
            "use tensorwise, or parallel.layer_backend torch",
        )
    most = layers // config.parallel.pipeline_model_parallel_size
    for name, count in (("start", first), ("end", last)):
        if count > most:
            yield Problem(
                f"precision.num_layers_at_{name}_in_bf16",
                count,
                f"Megatron-Core allows as many as a pipeline stage has layers, {most}",
                f"use at most {most}, or parallel.layer_backend torch",
            )


def _dimensions(config: RunConfig) -> Iterator[tuple[str, int, int, str]]:
    """(key, its value, size on a rank, what that is) of every dimension of a product in FP8."""
    text, parallel, tokens = config.model.text, config.parallel, config.data.seq_length
    tp = parallel.tensor_model_parallel_size
    groups = max(text.num_query_groups // tp, 1)
    heads = text.num_attention_heads // tp
    yield "model.text.hidden_size", text.hidden_size, text.hidden_size, "the width of its products"
    yield (
        "model.text.ffn_hidden_size",
        text.ffn_hidden_size,
        text.ffn_hidden_size // tp,
        f"a share of TP {tp}",
    )
    channels = f"the channels of a share of TP {tp}"
    yield "model.text.kv_channels", text.kv_channels, heads * text.kv_channels, channels
    yield "model.text.kv_channels", text.kv_channels, (heads + 2 * groups) * text.kv_channels, channels
    shards = parallel.context_parallel_size * (tp if parallel.sequence_parallel else 1)
    rows = tokens * config.train.micro_batch_size // shards
    yield "data.seq_length", tokens, rows, "the tokens of a micro-batch on a rank"
    if config.precision.fp8_vision:
        yield from _tower(config.model, parallel)


def _tower(model: ModelConfig, parallel: ParallelConfig) -> Iterator[tuple[str, int, int, str]]:
    vision = model.vision
    split = parallel.tensor_model_parallel_size if parallel.vision_placement == "tensor" else 1
    share = f"a share of TP {split}"
    yield "model.vision.hidden_size", vision.hidden_size, vision.hidden_size // split, share
    yield "model.vision.ffn_hidden_size", vision.ffn_hidden_size, vision.ffn_hidden_size // split, share
    yield "model.vision.image_size", vision.image_size, vision.global_grid**2, "the patches of a global view"
    yield "model.vision.crop_size", vision.crop_size, vision.crop_grid**2, "the patches of a crop"
