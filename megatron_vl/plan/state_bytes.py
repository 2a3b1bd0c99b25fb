"""Bytes of weights, gradients and optimizer on one rank, exactly as Megatron-Core 0.16.1 allocates them.

Rules (`distributed/param_and_grad_buffer.py`): the trained weights of a chunk stand in one buffer, last weight first,
cut into buckets where reduction overlaps the backward pass (`plan/overlap.py`), else one bucket. With the distributed
optimizer each weight begins at a multiple of 64 elements, the end of a bucket is padded to a multiple of
lcm(DP x CP, 128), weights live in a buffer of that length too, and rank r of DP x CP (context fastest) owns the r-th
equal piece of every bucket. Without it nothing is padded. A tower beside the pipeline has a buffer of its own, one
bucket, cut over all ranks of the world.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    bucket: int | None = None,
) -> RankBytes:
    """Bytes on the fullest rank of a pipeline stage. stage_chunks: as `held_stages` has them.

    weight_bytes: 2 (bf16, with an fp32 copy in the optimizer) or 4. Gradients are fp32. Frozen parts have neither
    gradients nor state. The optimizer's bytes are those of whole pieces of the buckets; ranks whose pieces have
    padding in them hold less (`bytes_of_rank`). bucket: as `overlap.bucket_elements` says.
    """
    weights = gradients = optimizer = 0
    equal: dict[tuple, tuple[int, int]] = {}  # interleaved, most chunks are
    for stage in stage_chunks:
        cut = bucket if is_cut(stage) else None
        shards = pieces_of(layout, stage) if distributed_optimizer else 1
        kind = (len(stage.layers), stage.has_vision, stage.has_embedding, stage.has_head, cut, shards)
        if kind not in equal:
            equal[kind] = chunk_lengths(model, layout, stage, shards, distributed_optimizer, cut)
        frozen, length = equal[kind]
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
    bucket: int | None = None,
) -> RankBytes:
    """Bytes on the rank at `coords` of the stage, with torch's AdamW after its first step.

    Weights count as allocated: with the distributed optimizer the padding of their buffer is in.
    """
    whole = bytes_of_stage(model, layout, stage_chunks, weight_bytes, distributed_optimizer, bucket)
    elements = tensors = 0
    for stage in stage_chunks:
        shards, shard = 1, 0
        if distributed_optimizer:
            shards = pieces_of(layout, stage)
            shard = layout.rank(coords) if stage.beside else coords.cp + layout.cp * coords.dp
        weights = weights_of_chunk(model, layout, stage)
        cut = bucket if is_cut(stage) else None
        some, count = owned(weights, frozen_parts(model), shards, shard, distributed_optimizer, cut)
        elements, tensors = elements + some, tensors + count
    optimizer = state_element_bytes(weight_bytes) * elements + STEP_BYTES * tensors
    return RankBytes(whole.weights, whole.gradients, optimizer)


def is_cut(stage: Stage) -> bool:
    """Whether the chunk's buffer is cut into buckets: the first chunk of the first pipeline rank only."""
    return not stage.beside and stage.pp_rank == 0 and stage.vp_stage == 0


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
    model: ModelConfig, layout: Layout, stage: Stage, shards: int, padded: bool, bucket: int | None = None
) -> tuple[int, int]:
    """(elements of frozen weights, elements of the buffer of trained ones) of one chunk."""
    split = layout.tp if layout.placement == "tensor" else 1
    marks = (stage.has_vision, stage.has_embedding, stage.has_head)
    multiple = math.lcm(shards, BUCKET_END) if padded else 1
    inner = 1 if bucket is None else multiple  # one bucket is padded below, so that its length is found once
    kept, end, _ = _cut(
        model.vision, model.text, layout.tp, split, len(stage.layers), marks, frozen_parts(model), padded, bucket, inner
    )  # fmt: skip
    return kept, padded_to(end, multiple)


def owned(
    weights: tuple[Weight, ...],
    frozen: tuple[str, ...],
    shards: int,
    shard: int,
    padded: bool,
    bucket: int | None = None,
) -> tuple[int, int]:
    """(elements, number of tensors) of trained weights within the `shard`-th equal piece of each bucket."""
    sizes: list[int] = []
    for one in _buckets(weights, frozen, padded, bucket, math.lcm(shards, BUCKET_END) if padded else 1):
        length = one.end - one.start
        first, last = (one.start + n * length // shards for n in (shard, shard + 1))
        sizes += [min(end, last) - max(start, first) for start, end in one.spans]
    return sum(size for size in sizes if size > 0), sum(size > 0 for size in sizes)


@dataclass(frozen=True)
class _Bucket:
    """A stretch of a chunk's gradient buffer; spans: (start, end) of its weights, in their order."""

    start: int
    end: int
    spans: list[tuple[int, int]]


def _buckets(
    weights: tuple[Weight, ...], frozen: tuple[str, ...], padded: bool, size: int | None, multiple: int
) -> list[_Bucket]:
    """The buckets of a chunk; size: elements after which one is closed. multiple: of their length."""
    found: list[_Bucket] = []
    spans: list[tuple[int, int]] = []
    first = end = 0
    for weight in reversed(weights):
        if weight.part in frozen:
            continue
        start = padded_to(end, WEIGHT_START) if padded else end
        end = start + weight.size
        spans.append((start, end))
        if size is not None and end - first >= size:
            end = padded_to(end, multiple)
            found.append(_Bucket(first, end, spans))
            first, spans = end, []
    if spans:
        found.append(_Bucket(first, padded_to(end, multiple), spans))
    return found


@dataclass(frozen=True)
class Buckets:
    """A stage's buckets for communication, in elements.

    count: how many; late, late_count: length and number of those with weights of tower or projector; last: the one of
    the others that is filled last; ahead: what comes in before the first decoder layer's weights, which are the late
    ones and, with the embedding, the one filled last.
    """

    count: int
    late: int = 0
    late_count: int = 0
    last: int = 0
    ahead: int = 0


def buckets_of_stage(
    model: ModelConfig, layout: Layout, stage_chunks: Sequence[Stage], padded: bool, bucket: int | None
) -> Buckets:
    """stage_chunks, bucket: as for `bytes_of_stage`, without a tower beside. padded: with the distributed optimizer."""
    first = stage_chunks[0]
    if not is_cut(first):
        return Buckets(len(stage_chunks))
    multiple = math.lcm(pieces_of(layout, first), BUCKET_END) if padded and bucket is not None else 1
    split = layout.tp if layout.placement == "tensor" else 1
    marks = (first.has_vision, first.has_embedding, first.has_head)
    _, _, found = _cut(
        model.vision, model.text, layout.tp, split, len(first.layers), marks, frozen_parts(model), padded, bucket,
        multiple,
    )  # fmt: skip
    return replace(found, count=found.count + len(stage_chunks) - 1)


@lru_cache(maxsize=4096)
def _cut(
    vision: VisionConfig,
    text: TextConfig,
    tp: int,
    split: int,
    num_layers: int,
    marks: tuple[bool, bool, bool],
    frozen: tuple[str, ...],
    padded: bool,
    bucket: int | None,
    multiple: int,
) -> tuple[int, int, Buckets]:
    """(elements of frozen weights, end of the buffer of trained ones, its buckets) of one chunk.

    The buffer begins with the last weight, so that it ends with embedding, projector and tower.
    """
    weights = weights_of_dimensions(vision, text, tp, split, num_layers, *marks)
    kept = sum(weight.size for weight in weights if weight.part in frozen)
    early = sum(weight.part == "decoder" and "decoder" not in frozen for weight in weights)
    found = _buckets(weights, frozen, padded, bucket, multiple)
    late = late_count = last = seen = 0
    for one in found:
        seen += len(one.spans)
        if seen > early:  # holds a weight of projector or tower
            late, late_count = late + one.end - one.start, late_count + 1
        else:
            last = one.end - one.start
    end = found[-1].end if found else 0
    return kept, end, Buckets(len(found), late, late_count, last, late + last)
