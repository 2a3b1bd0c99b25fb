"""Bytes of weights, gradients and optimizer on one rank, exactly as Megatron-Core 0.16.1 allocates them.

Rules (`distributed/param_and_grad_buffer.py`, without overlap of reduction and backward: one bucket per chunk): the
trained weights of a chunk stand in one buffer, last weight first. With the distributed optimizer each begins at a
multiple of 64 elements, the end is padded to a multiple of lcm(DP x CP, 128), weights live in a buffer of that length
too, and rank r of DP x CP (context fastest) owns the r-th equal piece. Without it nothing is padded. A tower beside the
pipeline has a buffer of its own, cut over all ranks of the world.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_vl.config.model import ModelConfig, TextConfig, VisionConfig
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.stages import Stage
from megatron_vl.plan.tensors import Weight, padded_to, weights_of_chunk, weights_of_dimensions

WEIGHT_START = 64  # elements; a weight begins at a multiple
BUCKET_END = 128
GRADIENT_BYTES = 4
MOMENTS_BYTES = 8  # of AdamW, both fp32
MAIN_WEIGHT_BYTES = 4  # fp32 copy of a bf16 weight
STEP_BYTES = 4  # torch's AdamW counts the steps of each tensor in an fp32 scalar


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank that stay for the whole run, without activations and library buffers."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Sum of all three."""
        return self.weights + self.gradients + self.optimizer


def state_element_bytes(weight_bytes: int) -> int:
    """Optimizer bytes per trained element: two moments, and the fp32 copy where weights are bf16."""
    return MOMENTS_BYTES + (MAIN_WEIGHT_BYTES if weight_bytes == 2 else 0)


def bytes_of_stage(
    model: ModelConfig,
    layout: Layout,
    stage_chunks: Sequence[Stage],
    weight_bytes: int = 2,
    distributed_optimizer: bool = True,
) -> RankBytes:
    """Bytes on the fullest rank of a pipeline stage. stage_chunks: as `held_stages` has them.

    weight_bytes: 2 (bf16, with an fp32 copy in the optimizer) or 4. Gradients are fp32. Frozen parts have neither
    gradients nor state. The optimizer's bytes are those of a whole piece of the buffer; ranks whose piece has
    padding in it hold less (`bytes_of_rank`).
    """
    weights = gradients = optimizer = 0
    for stage in stage_chunks:
        shards = pieces_of(layout, stage) if distributed_optimizer else 1
        frozen, length = chunk_lengths(model, layout, stage, shards, distributed_optimizer)
        weights += weight_bytes * (frozen + length)
        gradients += GRADIENT_BYTES * length
        optimizer += state_element_bytes(weight_bytes) * (length // shards)
    return RankBytes(weights, gradients, optimizer)


def bytes_of_rank(
    model: ModelConfig,
    layout: Layout,
    stage_chunks: Sequence[Stage],
    coords: Coords,
    weight_bytes: int = 2,
    distributed_optimizer: bool = True,
) -> RankBytes:
    """Bytes on the rank at `coords` of the stage, with torch's AdamW after its first step.

    Weights count as allocated: with the distributed optimizer the padding of their buffer is in.
    """
    whole = bytes_of_stage(model, layout, stage_chunks, weight_bytes, distributed_optimizer)
    elements = tensors = 0
    for stage in stage_chunks:
        shards, shard = 1, 0
        if distributed_optimizer:
            shards = pieces_of(layout, stage)
            shard = layout.rank(coords) if stage.beside else coords.cp + layout.cp * coords.dp
        weights = weights_of_chunk(model, layout, stage)
        some, count = owned(weights, frozen_parts(model), shards, shard, distributed_optimizer)
        elements, tensors = elements + some, tensors + count
    optimizer = state_element_bytes(weight_bytes) * elements + STEP_BYTES * tensors
    return RankBytes(whole.weights, whole.gradients, optimizer)


def pieces_of(layout: Layout, stage: Stage) -> int:
    """Over how many ranks the distributed optimizer cuts a chunk: DP x CP; all, for a tower that all of them hold."""
    return layout.world_size if stage.beside else layout.dp * layout.cp


def frozen_parts(model: ModelConfig) -> tuple[str, ...]:
    """Parts without gradients."""
    flags = {
        "vision": model.freeze_vision,
        "projector": model.freeze_projector,
        "decoder": model.freeze_decoder,
    }
    return tuple(part for part, frozen in flags.items() if frozen)


def chunk_lengths(
    model: ModelConfig, layout: Layout, stage: Stage, shards: int, padded: bool
) -> tuple[int, int]:
    """(elements of frozen weights, elements of the buffer of trained ones) of one chunk."""
    split = layout.tp if layout.placement == "tensor" else 1
    marks = (stage.has_vision, stage.has_embedding, stage.has_head)
    kept, end = _lengths(
        model.vision, model.text, layout.tp, split, len(stage.layers), marks, frozen_parts(model), padded
    )
    return kept, padded_to(end, math.lcm(shards, BUCKET_END)) if padded else end


@lru_cache(maxsize=4096)
def _lengths(
    vision: VisionConfig,
    text: TextConfig,
    tp: int,
    split: int,
    num_layers: int,
    marks: tuple[bool, bool, bool],
    frozen: tuple[str, ...],
    padded: bool,
) -> tuple[int, int]:
    """(elements of frozen weights, end of the last trained weight in the buffer)."""
    weights = weights_of_dimensions(vision, text, tp, split, num_layers, *marks)
    kept = sum(weight.size for weight in weights if weight.part in frozen)
    return kept, max((end for _, end in _spans(weights, frozen, padded)), default=0)


def owned(
    weights: tuple[Weight, ...], frozen: tuple[str, ...], shards: int, shard: int, padded: bool
) -> tuple[int, int]:
    """(elements, number of tensors) of trained weights within the `shard`-th equal piece of the chunk's buffer."""
    spans = _spans(weights, frozen, padded)
    end = spans[-1][1] if spans else 0
    length = padded_to(end, math.lcm(shards, BUCKET_END)) if padded else end
    first, last = shard * length // shards, (shard + 1) * length // shards
    mine = [min(end, last) - max(start, first) for start, end in spans]
    return sum(size for size in mine if size > 0), sum(size > 0 for size in mine)


def _spans(weights: tuple[Weight, ...], frozen: tuple[str, ...], padded: bool) -> list[tuple[int, int]]:
    """(start, end) of each trained weight in a chunk's gradient buffer, in its order."""
    spans, end = [], 0
    for weight in reversed(weights):
        if weight.part in frozen:
            continue
        start = padded_to(end, WEIGHT_START) if padded else end
        end = start + weight.size
        spans.append((start, end))
    return spans
