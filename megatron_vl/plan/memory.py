"""Memory of a rank by part and by pipeline stage: what stays, what is in flight, and what comes and goes.

States are exact, activations are those of `plan/kept.py` with what it leaves out. Of what comes and goes only the
largest thing is counted, and not the buffers of gradient reduction, feature exchange and the ring of K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RecomputeConfig, RunConfig
from megatron_vl.plan.budget import num_microbatches
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.kept import (
    Load,
    heaviest,
    heaviest_share,
    kept_by_chunk,
    layer_kept,
    layer_moved,
    step_views_kept,
    tower_kept,
    view_shares,
)
from megatron_vl.plan.kernels import HOPPER, Kernels, kernels_of_run
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.loss_chunk import loss_chunk_tokens
from megatron_vl.plan.overlap import bucket_elements
from megatron_vl.plan.schedule import peaks_in_flight
from megatron_vl.plan.stages import Stage
from megatron_vl.plan.state_bytes import RankBytes, bytes_of_stage
from megatron_vl.plan.tensors import padded_to
from megatron_vl.plan.vision_share import CROP, GLOBAL

PARTS = ("weights", "gradients", "optimizer", "tower", "decoder", "loss", "pipeline", "workspace", "reserve")


@dataclass(frozen=True)
class Setting:
    """What memory depends on besides layout and stage.

    weight_bytes: 2 or 4. loss_chunk: `train.loss_chunk_tokens`. reserve: bytes of libraries and fragmentation. bucket:
    as `overlap.bucket_elements` says. waiting: bytes of a decoder layer that are to leave the device and have not when
    its forward pass ends (`step_time.Rates`).
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
    bucket: int | None = None
    waiting: float = 0.0


def setting_of(
    config: RunConfig,
    layout: Layout,
    load: Load,
    weight_bytes: int,
    on_cpu: bool,
    reserve: int = 0,
    capability: tuple[int, int] | None = HOPPER,
) -> Setting:
    """The setting of a run in a layout. capability: of a GPU."""
    parallel = config.parallel
    return Setting(
        model=config.model,
        kernels=kernels_of_run(config, weight_bytes, on_cpu, capability),
        recompute=config.recompute,
        load=load,
        num_microbatches=num_microbatches(config.train, layout.dp),
        weight_bytes=weight_bytes,
        distributed_optimizer=parallel.use_distributed_optimizer,
        loss_chunk=config.train.loss_chunk_tokens,
        reserve=reserve,
        bucket=bucket_elements(parallel, layout.dp * layout.cp, on_cpu),
    )


def fixed_bytes(setting: Setting, layout: Layout, chunks: Sequence[Stage]) -> RankBytes:
    """Weights, gradients and optimizer of a pipeline stage."""
    return bytes_of_stage(
        setting.model, layout, chunks, setting.weight_bytes, setting.distributed_optimizer, setting.bucket
    )


def memory_of_stage(
    setting: Setting, layout: Layout, chunks: Sequence[Stage], fixed: RankBytes | None = None
) -> dict[str, int]:
    """Bytes by `PARTS` on the fullest rank of a pipeline stage. chunks: as `held_stages` has them. fixed: its
    `fixed_bytes`, where they are known.

    tower, decoder, loss: activations of all micro-batches in flight. pipeline: their hidden states at the borders of
    the chunks, which the schedule keeps. workspace: the largest thing that comes and goes: a recomputed group of
    layers, a recomputed chunk of views, the logits of a chunk of the loss, the gradient of an MLP's inner activations,
    or all of a row's K and V where they are gathered.
    """
    fixed = fixed or fixed_bytes(setting, layout, chunks)
    chunks = [stage for stage in chunks if not stage.beside]
    coords = _fullest(setting, layout, chunks[0].pp_rank)
    equal: dict[tuple, dict[str, int]] = {}  # interleaved, most chunks are
    kept = []
    for stage in chunks:
        of_fp8 = len(setting.kernels.fp8.intersection(stage.layers))
        kind = (len(stage.layers), of_fp8, stage.has_vision, stage.has_embedding, stage.has_head)
        if kind not in equal:
            equal[kind] = kept_by_chunk(
                setting.model, layout, stage, setting.kernels, setting.load, setting.recompute, coords
            )
        kept.append(equal[kind])
    flights = peaks_in_flight(layout.pp, layout.vpp, chunks[0].pp_rank, setting.num_microbatches)
    sums = [sum(part.values()) for part in kept]
    flight = max(flights, key=lambda counts: sum(n * one for n, one in zip(counts, sums)))
    active = {
        part: sum(n * one[part] for n, one in zip(flight, kept)) for part in ("vision", "decoder", "loss")
    }
    borders, passing = _borders(setting, layout, chunks, flight), workspace(setting, layout, chunks)
    if layout.tower_beside:
        # before the pipeline and after it, when nothing of the decoder is there
        alone = _passing_tower(setting, layout) - active["decoder"] - active["loss"] - borders
        passing = max(passing, alone)
        active["vision"] += step_views_kept(
            setting.model, layout, setting.kernels, setting.load, setting.recompute, setting.num_microbatches, coords
        )  # fmt: skip
    return {
        "weights": fixed.weights,
        "gradients": fixed.gradients,
        "optimizer": fixed.optimizer,
        "tower": active["vision"],
        "decoder": active["decoder"],
        "loss": active["loss"],
        "pipeline": borders,
        "workspace": passing,
        "reserve": setting.reserve,
    }


def _fullest(setting: Setting, layout: Layout, pp_rank: int) -> Coords:
    """The rank of the stage with the most patches to encode."""
    load = setting.load
    if layout.tower_beside:
        views = (load.crops * setting.num_microbatches, load.globals * setting.num_microbatches)
        costs, size = view_costs(setting.model), layout.tp * layout.cp
        here = view_shares(*views, layout.vision_size, costs)[pp_rank * size : (pp_rank + 1) * size]
        most = here.index(
            max(set(here), key=lambda mine: mine[CROP] * costs[CROP] + mine[GLOBAL] * costs[GLOBAL])
        )
        return Coords(most % layout.tp, most // layout.tp, 0, pp_rank)
    if pp_rank or not load.crops + load.globals:
        return Coords(0, 0, 0, pp_rank)
    share = heaviest_share(setting.model, load.crops, load.globals, layout.vision_size)
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
    found, waiting = [0], round(setting.waiting * most_layers)
    if most_layers:
        inner = 2 * local * 2 * text.ffn_hidden_size // layout.tp * element
        if layout.cp > 1 and not setting.kernels.ring:
            inner = max(inner, _gathered_keys(setting, layout))
        found.append(inner)
    if most_layers and recompute.decoder == "full":
        one = layer_kept(text, layout, setting.kernels, load, False)
        found.append(one * min(recompute.decoder_num_layers, most_layers) + found[-1] + waiting)
    elif most_layers and recompute.offload:  # a layer's tensors on their way, beside those of the computation
        quantised = any(setting.kernels.fp8.intersection(stage.layers) for stage in chunks)
        selective, trained = recompute.decoder == "selective", not model.freeze_decoder
        moved = layer_moved(text, layout, setting.kernels, load, selective, trained, quantised)[1]
        found.append(found[-1] + max(moved, waiting))
    if any(stage.has_vision for stage in chunks):
        found.append(_passing_tower(setting, layout))
    if any(stage.has_head for stage in chunks):
        words = padded_to(text.vocab_size, layout.tp) // layout.tp
        chunk = min(loss_chunk_tokens(words, setting.loss_chunk), local)
        rows = 2 * local * text.hidden_size * element  # all hidden states and their gradient
        found.append(chunk * words * (4 + 2 * element) + rows)
    return max(found)


def _gathered_keys(setting: Setting, layout: Layout) -> int:
    """Bytes of K and V of whole rows in the backward pass: as gathered, their gradient, and one call's part of both."""
    text, load = setting.model.text, setting.load
    groups = max(text.num_query_groups // layout.tp, 1)
    return 4 * load.rows * load.tokens * 2 * groups * text.kv_channels * setting.kernels.element


def _passing_tower(setting: Setting, layout: Layout) -> int:
    """Bytes of the tower that come and go, for the larger of the two kinds of views: one recomputed group of blocks, a
    recomputed chunk of views with what it keeps meanwhile, one block of a frozen tower."""
    model, load, recompute = setting.model, setting.load, setting.recompute
    vision, element = model.vision, setting.kernels.element
    split = layout.tp if layout.placement == "tensor" else 1
    group = min(recompute.vision_num_layers, vision.num_layers) if recompute.vision == "full" else 0
    sizes = [0]
    counts = heaviest(model, load, layout.vision_size)
    if layout.tower_beside:
        steps = setting.num_microbatches
        of_step = replace(load, crops=load.crops * steps, globals=load.globals * steps)
        counts = tuple(-(-count // steps) for count in heaviest(model, of_step, layout.vision_size))
    for kind, count in zip((CROP, GLOBAL), counts):
        if not count:
            continue
        chunk, tokens = recompute.vision_chunk_views, (vision.crop_tokens, vision.global_tokens)[kind]
        together = count if chunk is None else min(chunk, count)
        block = tower_kept(vision, kind, together, split, setting.kernels, 0) // vision.num_layers
        passing = block if model.freeze_vision else group * block
        if chunk is not None and not model.freeze_vision:
            passing += tower_kept(vision, kind, together, split, setting.kernels, group)
            passing += together * tokens * vision.output_size * element
        sizes.append(passing)
    return max(sizes)
