"""Memory of a rank by part and by pipeline stage: what stays, what is in flight, and what comes and goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.plan.kept import (
    Kernels,
    Load,
    heaviest,
    heaviest_share,
    kept_by_chunk,
    layer_kept,
    tower_kept,
)
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.loss_chunk import loss_chunk_tokens
from megatron_vl.plan.schedule import peaks_in_flight
from megatron_vl.plan.stages import Stage
from megatron_vl.plan.state_bytes import bytes_of_stage
from megatron_vl.plan.tensors import padded_to
from megatron_vl.plan.vision_share import CROP, GLOBAL

PARTS = ("weights", "gradients", "optimizer", "tower", "decoder", "loss", "pipeline", "workspace", "reserve")


@dataclass(frozen=True)
class Setting:
    """What memory depends on besides layout and stage.

    weight_bytes: 2 or 4. loss_chunk: `train.loss_chunk_tokens`. reserve: bytes of libraries and fragmentation.
    """

    model: ModelConfig
    kernels: Kernels
    recompute: RecomputeConfig
    load: Load
    num_microbatches: int
    weight_bytes: int
    distributed_optimizer: bool = True
    loss_chunk: int | None = None
    reserve: int = 0


def memory_of_stage(setting: Setting, layout: Layout, chunks: Sequence[Stage]) -> dict[str, int]:
    """Bytes by `PARTS` on the fullest rank of a pipeline stage.

    tower, decoder, loss: activations of all micro-batches in flight. pipeline: their hidden states at the borders of
    the chunks, which the schedule keeps. workspace: the largest thing that comes and goes: a recomputed group of
    layers, the logits of a chunk of the loss, or the gradient of an MLP's inner activations.
    """
    fixed = bytes_of_stage(setting.model, layout, chunks, setting.weight_bytes, setting.distributed_optimizer)
    coords = _fullest(setting, layout, chunks[0].pp_rank)
    kept = [
        kept_by_chunk(setting.model, layout, stage, setting.kernels, setting.load, setting.recompute, coords)
        for stage in chunks
    ]
    flights = peaks_in_flight(layout.pp, layout.vpp, chunks[0].pp_rank, setting.num_microbatches)
    sums = [sum(part.values()) for part in kept]
    flight = max(flights, key=lambda counts: sum(n * one for n, one in zip(counts, sums)))
    active = {
        part: sum(n * one[part] for n, one in zip(flight, kept)) for part in ("vision", "decoder", "loss")
    }
    return {
        "weights": fixed.weights,
        "gradients": fixed.gradients,
        "optimizer": fixed.optimizer,
        "tower": active["vision"],
        "decoder": active["decoder"],
        "loss": active["loss"],
        "pipeline": _borders(setting, layout, chunks, flight),
        "workspace": workspace(setting, layout, chunks),
        "reserve": setting.reserve,
    }


def _fullest(setting: Setting, layout: Layout, pp_rank: int) -> Coords:
    """The rank of the stage with the most patches to encode; without views, one with full masks."""
    rank = min(1, layout.cp - 1)
    load = setting.load
    if pp_rank or not load.crops + load.globals:
        return Coords(0, rank, 0, pp_rank)
    share = heaviest_share(setting.model.vision, load.crops, load.globals, layout.vision_size)
    width = layout.tp if layout.placement == "data" else 1
    return Coords(share % width, share // width, 0, 0)


def _borders(setting: Setting, layout: Layout, chunks: Sequence[Stage], flight: Sequence[int]) -> int:
    """Hidden states received and sent that the schedule keeps until the backward pass."""
    if layout.pp == 1:
        return 0
    tokens = setting.load.rows * setting.load.tokens // layout.cp // (layout.tp if layout.sp else 1)
    one = tokens * setting.model.text.hidden_size * setting.kernels.element
    return sum(
        count * one * ((not stage.has_embedding) + (not stage.has_head))
        for count, stage in zip(flight, chunks)
    )


def workspace(setting: Setting, layout: Layout, chunks: Sequence[Stage]) -> int:
    """Bytes of the largest thing that comes and goes within a micro-batch."""
    model, load, element = setting.model, setting.load, setting.kernels.element
    text, recompute = model.text, setting.recompute
    local = load.rows * load.tokens // layout.cp
    most_layers = max(len(stage.layers) for stage in chunks)
    found = [0]
    if most_layers:
        found.append(2 * local * 2 * text.ffn_hidden_size // layout.tp * element)
    if most_layers and recompute.decoder == "full":
        one = layer_kept(text, layout, setting.kernels, load, False, min(1, layout.cp - 1))
        found.append(one * min(recompute.decoder_num_layers, most_layers) + found[-1])
    if any(stage.has_vision for stage in chunks) and recompute.vision == "full" and not model.freeze_vision:
        found.append(_recomputed_tower(setting, layout))
    if any(stage.has_head for stage in chunks):
        words = padded_to(text.vocab_size, layout.tp) // layout.tp
        chunk = min(loss_chunk_tokens(words, setting.loss_chunk), local)
        rows = 2 * local * text.hidden_size * element  # all hidden states and their gradient
        found.append(chunk * words * (4 + 2 * element) + rows)
    return max(found)


def _recomputed_tower(setting: Setting, layout: Layout) -> int:
    """Bytes of one recomputed group of the tower's blocks, for the larger of the two kinds of views."""
    load, vision = setting.load, setting.model.vision
    split = layout.tp if layout.placement == "tensor" else 1
    blocks = min(setting.recompute.vision_num_layers, vision.num_layers)
    sizes = []
    for kind, count in zip((CROP, GLOBAL), heaviest(vision, load, layout.vision_size)):
        if count:
            whole = tower_kept(vision, kind, count, split, setting.kernels.element, 0)
            sizes.append(whole * blocks // vision.num_layers)
    return max(sizes, default=0)
