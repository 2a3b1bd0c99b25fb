"""What each rank of a layout carries: planned FLOPs and parameters (bytes: `plan/state_bytes.py`).

Placement `data`: the TP x CP ranks of the first stage each encode their own views with the whole tower.
Placement `tensor`: views are shared out over CP, and every product of the tower is sharded over TP.
Decoder: products over TP, tokens over CP, layers over the stages; zigzag gives each CP rank the same causal
attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_vl.config.model import ModelConfig
from megatron_vl.plan.cost import PARTS, TOWER_PARTS, decoder_layer_flops, view_costs, view_flops
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.stages import Stage
from megatron_vl.plan.tensors import padded_to, weights_of_chunk
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_step, share_views


def flops_by_rank(
    model: ModelConfig,
    layout: Layout,
    stages: list[list[Stage]],
    view_kinds: Sequence[int],
    doc_lengths: Sequence[int],
    tokens: int | None = None,
) -> dict[Coords, dict[str, float]]:
    """Planned forward FLOPs by part of one micro-batch, for each rank of one data-parallel replica (dp 0). In placement
    `all` of a step that has no other.

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
        if layout.tower_beside or any(stage.has_vision for stage in here):
            mine = vision_shares[layout.vision_rank(coords)]
            for part in TOWER_PARTS:
                share[part] = sum(views[view_kinds[view]][part] for view in mine) / tower_split
        share["decoder_linear"] = num_layers * linear / (layout.tp * layout.cp)
        share["decoder_attention"] = num_layers * attention / (layout.tp * layout.cp)
        if any(stage.has_head for stage in here):
            share["lm_head"] = 2 * rows * width * padded_vocab / (layout.tp * layout.cp)
        result[coords] = share
    return result


def views_of_rank(
    model: ModelConfig, layout: Layout, coords: Coords, kinds: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Which views of each micro-batch of a step the rank encodes, crops first; kinds: of all of them by micro-batch."""
    if not layout.encodes(coords):
        return [[] for _ in kinds]
    shares = share_step(kinds, layout.vision_size, view_costs(model), layout.tower_beside)
    return [of_ranks[layout.vision_rank(coords)] for of_ranks in shares]


def replica_ranks(layout: Layout) -> Iterator[Coords]:
    """The ranks of data-parallel replica 0, in global rank order."""
    for pp in range(layout.pp):
        for cp in range(layout.cp):
            for tp in range(layout.tp):
                yield Coords(tp=tp, cp=cp, dp=0, pp=pp)


def parameters_of_stage(model: ModelConfig, layout: Layout, stage_chunks: Sequence[Stage]) -> dict[str, int]:
    """Parameters that each rank of a pipeline stage holds: `vision`, `projector` and `decoder`."""
    counts = {"vision": 0, "projector": 0, "decoder": 0}
    for stage in stage_chunks:
        for weight in weights_of_chunk(model, layout, stage):
            counts[weight.part] += weight.size
    return counts
