"""What one rank needs at the height of a step, planned from the description; nothing of it was measured on a GPU.

Counted: weights, gradients and optimizer (`plan.shares`), what the backward pass keeps of each layer, the layer that
is computed at the moment, and the loss. Not counted: the CUDA context, NCCL's buffers and fragmentation, for which a
tenth of the device should stay free. Attention is taken to keep its inputs and output only (flash attention).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.schema import RunConfig
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.loss_chunk import loss_chunk_tokens
from megatron_vl.plan.shares import bytes_of_stage, padded_to
from megatron_vl.plan.stages import Stage

FP32 = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. states: weights, gradients, optimizer. decoder, tower: kept for the backward pass, and the
    layer that is computed. loss: of the last stage. views: (global views, crops) of a row that are planned for."""

    states: int
    decoder: int
    tower: int
    loss: int
    views: tuple[int, int]

    @property
    def total(self) -> int:
        """Decoder and tower do not compute at once, but what they keep lies there together."""
        return self.states + self.decoder + self.tower + self.loss


def memory_of_stage(config: RunConfig, layout: Layout, chunks: list[Stage], weight_bytes: int) -> RankMemory:
    """The rank of a pipeline stage that has most. chunks: the stage's; weight_bytes: 2 (bf16) or 4."""
    parallel, model = config.parallel, config.model
    states = bytes_of_stage(model, layout, chunks, weight_bytes, parallel.use_distributed_optimizer)
    has_vision, has_head = any(c.has_vision for c in chunks), any(c.has_head for c in chunks)
    views = views_of_row(config)
    return RankMemory(
        states=states.total,
        decoder=_decoder_bytes(config, layout, chunks, weight_bytes),
        tower=_tower_bytes(config, layout, views, weight_bytes) if has_vision else 0,
        loss=_loss_bytes(config, layout, weight_bytes) if has_head else 0,
        views=views,
    )


def views_of_row(config: RunConfig) -> tuple[int, int]:
    """(global views, crops) of the row with most: as many as its tokens and the limits of packing allow."""
    vision, packing, left = config.model.vision, config.data.packing, config.data.seq_length
    most_globals, most_crops = (
        (packing.max_global_views, packing.max_crops) if packing.enabled else (None, None)
    )
    crops = left // vision.crop_tokens if most_crops is None else min(most_crops, left // vision.crop_tokens)
    left -= crops * vision.crop_tokens
    globals_ = left // vision.global_tokens
    return (globals_ if most_globals is None else min(most_globals, globals_)), crops


def microbatches_in_flight(layout: Layout, pp_rank: int) -> float:
    """Micro-batches, each of all chunks of the stage, whose activations a stage keeps at once (1F1B, interleaved)."""
    if layout.pp == 1:
        return 1.0
    if layout.vpp == 1:
        return float(layout.pp - pp_rank)
    return (2 * (layout.pp - pp_rank - 1) + (layout.vpp - 1) * layout.pp + 1) / layout.vpp


def _decoder_bytes(config: RunConfig, layout: Layout, chunks: list[Stage], weight_bytes: int) -> int:
    text, recompute = config.model.text, config.recompute
    tokens = config.train.micro_batch_size * config.data.seq_length // layout.cp
    sharded = tokens // (layout.tp if layout.sp else 1)
    queries, keys = text.num_attention_heads * text.kv_channels, text.num_query_groups * text.kv_channels
    # Inputs and results of two norms (computed in fp32); q, k, v, q and k after their norm and after the rotation,
    # the result of attention; gate, up, silu(gate) and their product.
    norms = sharded * text.hidden_size * 2 * (FP32 + weight_bytes)
    inner = tokens * weight_bytes * (4 * queries + 4 * keys + 4 * text.ffn_hidden_size) // layout.tp
    gathered = 2 * tokens * text.hidden_size * weight_bytes  # under sequence parallelism, and its gradient
    layer, boundary = norms + inner, sharded * text.hidden_size * weight_bytes
    layers = sum(len(chunk.layers) for chunk in chunks)
    flying = microbatches_in_flight(layout, chunks[0].pp_rank)
    if not layers:
        return 0
    if recompute.decoder == "full":
        group = min(recompute.decoder_num_layers, layers)
        return int(flying * boundary * -(-layers // group)) + group * layer + gathered
    return int(flying * layers * layer) + gathered


def _tower_bytes(config: RunConfig, layout: Layout, views: tuple[int, int], weight_bytes: int) -> int:
    """Of the rank with most views; crops go through the tower together, then global views."""
    vision, recompute, model = config.model.vision, config.recompute, config.model
    split = layout.tp if layout.placement == "tensor" else 1
    rows = config.train.micro_batch_size
    globals_, crops = (-(-count * rows // layout.vision_size) for count in views)
    patches = globals_ * vision.global_grid**2, crops * vision.crop_grid**2
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    # As above: norms; q, k, v, their rotation, the result; fc1, its sigmoid, their product.
    whole = width * (2 * (FP32 + weight_bytes) + 2 * weight_bytes)
    block = whole + weight_bytes * (6 * width + 3 * inner) // split
    working = max(patches) * block
    if model.freeze_vision:
        return working
    flying = microbatches_in_flight(layout, 0)
    # Downsamplers: neighbourhoods of 9, at a quarter and at a sixteenth of the patches.
    downsamplers = sum(patches) * weight_bytes * 9 * (width // 4 + 2 * width // 16)
    if recompute.vision == "full":
        groups = -(-vision.num_layers // recompute.vision_num_layers)
        kept = sum(patches) * width * weight_bytes * groups
        return int(flying * (kept + downsamplers)) + recompute.vision_num_layers * working
    return int(flying * (sum(patches) * block * vision.num_layers + downsamplers)) + working


def _loss_bytes(config: RunConfig, layout: Layout, weight_bytes: int) -> int:
    """Hidden states of the row, three arrays of a chunk's logits, and the fp32 sum of the head's gradient."""
    text = config.model.text
    words = padded_to(text.vocab_size, layout.tp) // layout.tp
    tokens = config.train.micro_batch_size * config.data.seq_length // layout.cp
    chunk = min(tokens, loss_chunk_tokens(words, config.train.loss_chunk_tokens))
    return (
        2 * tokens * text.hidden_size * weight_bytes
        + 3 * FP32 * chunk * words
        + FP32 * words * text.hidden_size
    )
