"""What each rank of a layout carries: views of the tower and parameters (bytes: `plan/state_bytes.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.config.model import ModelConfig
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.stages import Stage
from megatron_vl.plan.tensors import weights_of_chunk
from megatron_vl.plan.vision_share import share_step


def views_of_rank(
    model: ModelConfig, layout: Layout, coords: Coords, kinds: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Which views of each micro-batch of a step the rank encodes, crops first; kinds: of all of them by micro-batch."""
    if not layout.encodes(coords):
        return [[] for _ in kinds]
    shares = share_step(kinds, layout.vision_size, view_costs(model), layout.tower_beside)
    return [of_ranks[layout.vision_rank(coords)] for of_ranks in shares]


def parameters_of_stage(model: ModelConfig, layout: Layout, stage_chunks: Sequence[Stage]) -> dict[str, int]:
    """Parameters that each rank of a pipeline stage holds: `vision`, `projector` and `decoder`."""
    counts = {"vision": 0, "projector": 0, "decoder": 0}
    for stage in stage_chunks:
        for weight in weights_of_chunk(model, layout, stage):
            counts[weight.part] += weight.size
    return counts
