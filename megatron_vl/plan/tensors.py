"""Every weight of a model chunk on one rank, in the order in which Megatron-Core registers them.

The order matters to the byte: the gradient buffer is filled from the last weight to the first with padding between,
and the distributed optimizer cuts that buffer, not the list of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_vl.config.model import ModelConfig, TextConfig, VisionConfig
from megatron_vl.plan.cost import CONV_TAPS, IMAGE_CHANNELS
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.stages import Stage


@dataclass(frozen=True)
class Weight:
    """One parameter tensor on one rank. size: its elements there. part: `vision`, `projector` or `decoder`."""

    name: str
    size: int
    part: str


def weights_of_chunk(model: ModelConfig, layout: Layout, stage: Stage) -> tuple[Weight, ...]:
    """Weights of one chunk of the `torch` backend, as `named_parameters()` gives them.

    The `transformer_engine` backend has the same tensors; those of fused norms stand elsewhere in the order.
    """
    split = layout.tp if layout.placement == "tensor" else 1
    return weights_of_dimensions(
        model.vision, model.text, layout.tp, split, len(stage.layers), stage.has_vision, stage.has_embedding,
        stage.has_head,
    )  # fmt: skip


@lru_cache(maxsize=256)
def weights_of_dimensions(
    vision: VisionConfig,
    text: TextConfig,
    tp: int,
    split: int,
    num_layers: int,
    has_vision: bool,
    has_embedding: bool,
    has_head: bool,
) -> tuple[Weight, ...]:
    """What `weights_of_chunk` returns; split: over how many ranks each product of the tower is cut."""
    found: list[Weight] = []
    if has_vision:
        found += [Weight(f"vision_model.{name}", size, "vision") for name, size in tower(vision, split)]
        projector = vision.output_size * text.hidden_size // split
        found.append(Weight("projector.linear.weight", projector, "projector"))
    rows = padded_to(text.vocab_size, tp) // tp * text.hidden_size
    named: list[tuple[str, int]] = []
    if has_embedding:
        named.append(("embedding.word_embeddings.weight", rows))
    for layer in range(num_layers):
        named += [(f"decoder.layers.{layer}.{name}", size) for name, size in decoder_layer(text, tp)]
    if has_head:
        named += [("decoder.final_layernorm.weight", text.hidden_size), ("output_layer.weight", rows)]
    return (*found, *(Weight(f"language_model.{name}", size, "decoder") for name, size in named))


def tower(vision: VisionConfig, split: int) -> Iterator[tuple[str, int]]:
    """(name, elements) of the tower. Biases of row-parallel products are whole on every rank."""
    width = vision.hidden_size
    yield "positional_embedding", vision.global_grid**2 * width
    yield "conv1.weight", IMAGE_CHANNELS * vision.patch_size**2 * width // split
    yield "ln_pre.weight", width
    yield "ln_pre.bias", width
    block = list(tower_block(vision, split))
    for layer in range(vision.num_layers):
        yield from ((f"transformer.layers.{layer}.{name}", size) for name, size in block)
    yield "vit_downsampler1.weight", CONV_TAPS * width * 2 * width // split
    yield "vit_downsampler1.bias", 2 * width // split
    yield "vit_downsampler2.weight", CONV_TAPS * 2 * width * 4 * width // split
    yield "vit_downsampler2.bias", 4 * width


def tower_block(vision: VisionConfig, split: int) -> Iterator[tuple[str, int]]:
    """(name, elements) of one block of the tower."""
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    yield "input_layernorm.weight", width
    yield "input_layernorm.bias", width
    yield "self_attention.linear_proj.weight", width * width // split
    yield "self_attention.linear_proj.bias", width
    yield "self_attention.linear_qkv.weight", 3 * width * width // split
    yield "self_attention.linear_qkv.bias", 3 * width // split
    yield "self_attn_bda.gamma", width
    yield "pre_mlp_layernorm.weight", width
    yield "pre_mlp_layernorm.bias", width
    yield "mlp.linear_fc1.weight", width * inner // split
    yield "mlp.linear_fc1.bias", inner // split
    yield "mlp.linear_fc2.weight", inner * width // split
    yield "mlp.linear_fc2.bias", width
    yield "mlp_bda.gamma", width


def decoder_layer(text: TextConfig, tp: int) -> Iterator[tuple[str, int]]:
    """(name, elements) of one decoder layer."""
    width, head = text.hidden_size, text.kv_channels
    queries = text.num_attention_heads * head
    yield "input_layernorm.weight", width
    yield "self_attention.linear_proj.weight", width * queries // tp
    yield "self_attention.linear_qkv.weight", (queries + 2 * text.num_query_groups * head) * width // tp
    yield "self_attention.q_layernorm.weight", head
    yield "self_attention.k_layernorm.weight", head
    yield "pre_mlp_layernorm.weight", width
    yield "mlp.linear_fc1.weight", 2 * text.ffn_hidden_size * width // tp
    yield "mlp.linear_fc2.weight", text.ffn_hidden_size * width // tp


def padded_to(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple
