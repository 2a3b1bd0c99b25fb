"""What each rank of a layout carries: planned FLOPs, parameters and bytes.

Placement `data`: the TP x CP ranks of the first stage each encode their own views with the whole tower.
Placement `tensor`: views are shared out over CP, and every product of the tower is sharded over TP.
Decoder: products over TP, tokens over CP, layers over the stages; zigzag gives each CP rank the same causal
attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig
from megatron_vl.plan.cost import (
    CONV_TAPS,
    IMAGE_CHANNELS,
    PARTS,
    TOWER_PARTS,
    decoder_layer_flops,
    decoder_layer_matrices,
    view_costs,
    view_flops,
)
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.stages import Stage
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_views


def flops_by_rank(
    model: ModelConfig,
    layout: Layout,
    stages: list[list[Stage]],
    view_kinds: Sequence[int],
    doc_lengths: Sequence[int],
    tokens: int | None = None,
) -> dict[Coords, dict[str, float]]:
    """Planned forward FLOPs by part of one micro-batch, for each rank of one data-parallel replica (dp 0).

    view_kinds: all views of the micro-batch, in token-stream order. doc_lengths, tokens: as in
    `cost.decoder_layer_flops`; over all CP ranks. The sum over the ranks is `cost.sample_flops`, apart from
    the rows by which the vocabulary is padded to a multiple of TP.
    """
    views = {kind: view_flops(model, kind) for kind in (CROP, GLOBAL)}
    vision_shares = share_views(view_kinds, layout.vision_size, view_costs(model))
    tower_split = layout.tp if layout.placement == "tensor" else 1
    linear, attention = decoder_layer_flops(model, doc_lengths, tokens)
    rows = sum(doc_lengths) if tokens is None else tokens
    width, padded_vocab = model.text.hidden_size, padded_to(model.text.vocab_size, layout.tp)
    result = {}
    for coords in replica_ranks(layout):
        here = stages[coords.pp]
        num_layers = sum(len(stage.layers) for stage in here)
        share = dict.fromkeys(PARTS, 0.0)
        if any(stage.has_vision for stage in here):
            mine = vision_shares[layout.vision_rank(coords)]
            for part in TOWER_PARTS:
                share[part] = sum(views[view_kinds[view]][part] for view in mine) / tower_split
        share["decoder_linear"] = num_layers * linear / (layout.tp * layout.cp)
        share["decoder_attention"] = num_layers * attention / (layout.tp * layout.cp)
        if any(stage.has_head for stage in here):
            share["lm_head"] = 2 * rows * width * padded_vocab / (layout.tp * layout.cp)
        result[coords] = share
    return result


def replica_ranks(layout: Layout) -> Iterator[Coords]:
    """The ranks of data-parallel replica 0, in global rank order."""
    for pp in range(layout.pp):
        for cp in range(layout.cp):
            for tp in range(layout.tp):
                yield Coords(tp=tp, cp=cp, dp=0, pp=pp)


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


def bytes_of_stage(
    model: ModelConfig,
    layout: Layout,
    stage_chunks: Sequence[Stage],
    weight_bytes: int = 2,
    distributed_optimizer: bool = True,
) -> RankBytes:
    """Bytes on each rank of a pipeline stage.

    weight_bytes: 2 (bf16, with an fp32 copy in the optimizer) or 4. Gradients are fp32; Adam keeps two fp32
    moments. The distributed optimizer shards its state over DP x CP. Frozen parts have neither gradients nor
    state.
    """
    counts = parameters_of_stage(model, layout, stage_chunks)
    frozen = {
        "vision": model.freeze_vision,
        "projector": model.freeze_projector,
        "decoder": model.freeze_decoder,
    }
    trained = sum(count for part, count in counts.items() if not frozen[part])
    state = 12 if weight_bytes == 2 else 8
    shards = layout.dp * layout.cp if distributed_optimizer else 1
    return RankBytes(
        weights=weight_bytes * sum(counts.values()),
        gradients=4 * trained,
        optimizer=-(-state * trained // shards),
    )


def parameters_of_stage(model: ModelConfig, layout: Layout, stage_chunks: Sequence[Stage]) -> dict[str, int]:
    """Parameters that each rank of a pipeline stage holds: `vision`, `projector` and `decoder`."""
    text, width = model.text, model.text.hidden_size
    counts = {"vision": 0, "projector": 0, "decoder": 0}
    matrices = decoder_layer_matrices(text)
    vocabulary = padded_to(text.vocab_size, layout.tp) // layout.tp * width
    for stage in stage_chunks:
        counts["decoder"] += len(stage.layers) * (matrices // layout.tp + 2 * width + 2 * text.kv_channels)
        counts["decoder"] += vocabulary * stage.has_embedding + (vocabulary + width) * stage.has_head
        if stage.has_vision:
            split = layout.tp if layout.placement == "tensor" else 1
            counts["vision"] += _tower_parameters(model, split)
            counts["projector"] += model.vision.output_size * width // split
    return counts


def _tower_parameters(model: ModelConfig, split: int) -> int:
    """Tower and downsamplers on one rank; matrices and column-parallel biases are cut `split` ways."""
    vision = model.vision
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    cut = 4 * width**2 + 3 * width + 2 * width * inner + inner
    whole = 2 * width + 6 * width  # biases of the two row-parallel layers; norms and layer scales
    stem = IMAGE_CHANNELS * vision.patch_size**2 * width // split + vision.global_grid**2 * width + 2 * width
    downsamplers = (CONV_TAPS * (2 * width**2 + 8 * width**2) + 6 * width) // split
    return stem + vision.num_layers * (cut // split + whole) + downsamplers


def padded_to(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple
