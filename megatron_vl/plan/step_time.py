"""Predicted seconds of an optimizer step: compute by part, collectives by link, pipeline bubbles, balance of views.

Compute is the cost model's FLOPs over what a device reaches (`plan/devices.py`), plus the memory traffic of
element-wise work, taken as a multiple of the bytes that a layer keeps. A ring over n ranks moves (n - 1) / n of the
bytes for an all-gather or a reduce-scatter, twice that for an all-reduce. Nothing that this trainer does not overlap
is taken as hidden: reduction of gradients, gathering of weights and tensor-parallel collectives stand in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.plan.cost import (
    TOWER_PARTS,
    decoder_layer_flops,
    parameters,
    train_multipliers,
    view_costs,
    view_flops,
)
from megatron_vl.plan.devices import Device
from megatron_vl.plan.kept import Kernels, Load, block_kept, layer_kept, view_shares
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.state_bytes import GRADIENT_BYTES, RankBytes
from megatron_vl.plan.tensors import padded_to
from megatron_vl.plan.vision_share import CROP, GLOBAL

TRAFFIC = 4.0  # element-wise reads and writes per kept byte, forward and backward
TRAFFIC_AGAIN = 2.0  # more of them when the forward pass is repeated
OPTIMIZER_TRAFFIC = (
    28  # bytes per owned element: gradient, fp32 weight and moments read and written, weight written
)
GRADIENT_TRAFFIC = 12  # bytes per element of the buffer: zeroed, scaled by the token count, read for the norm


@dataclass(frozen=True)
class Link:
    """A ring over ``size`` ranks: bytes per second of each rank, and latency of a collective."""

    size: int
    rate: float
    latency: float

    def gather(self, size_in_bytes: float) -> float:
        """Seconds of an all-gather or reduce-scatter whose whole tensor has so many bytes."""
        return (
            0.0 if self.size == 1 else (self.size - 1) / self.size * size_in_bytes / self.rate + self.latency
        )

    def reduce(self, size_in_bytes: float) -> float:
        """Seconds of an all-reduce."""
        return 2 * self.gather(size_in_bytes)


def link(device: Device, size: int, stride: int, ranks: int) -> Link:
    """The ring of a group of ``size`` ranks that are ``stride`` apart in a world of ``ranks``.

    Between nodes a group has the network shares of those of its members that sit in one node.
    """
    crowd = max(1.0, ranks / device.processors) if device.on_cpu else 1.0
    if size * stride <= device.node_ranks:
        return Link(size, device.intra_bytes / crowd, device.collective_seconds * crowd)
    members = min(size, max(1, device.node_ranks // stride))
    rate = min(device.intra_bytes, members * device.inter_bytes)
    return Link(size, rate, device.inter_seconds)


@dataclass(frozen=True)
class Piece:
    """Seconds of a micro-batch, forward and backward, by kind."""

    compute: float
    element: float
    tensor: float = 0.0
    context: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all kinds."""
        return self.compute + self.element + self.tensor + self.context

    @property
    def own(self) -> float:
        """Without collectives."""
        return self.compute + self.element

    def divided(self, by: int) -> Piece:
        """A part of it."""
        return Piece(self.compute / by, self.element / by, self.tensor / by, self.context / by)


@dataclass(frozen=True)
class Rates:
    """What the parts of a micro-batch cost on a rank of a layout.

    layer: one decoder layer. tower: the heaviest share of the views; tower_mean: the mean share; in placement `all` of
    a whole step, over the number of its micro-batches. head: loss included.
    border: seconds of a hidden state between two stages, forward and back.
    """

    layer: Piece
    tower: Piece
    tower_mean: float
    head: Piece
    border: float


def rates(
    model: ModelConfig,
    layout: Layout,
    device: Device,
    kernels: Kernels,
    load: Load,
    recompute: RecomputeConfig,
    num_microbatches: int = 1,
) -> Rates:
    """The rates of a layout; stages do not enter. num_microbatches: of a step, for placement `all`."""
    text, ranks = model.text, layout.world_size
    cut = layout.tp * layout.cp
    multiplier = train_multipliers(model, recompute)
    lengths = load.documents or (load.tokens,)
    linear, attention = decoder_layer_flops(model, lengths * load.rows, load.rows * load.tokens)
    passes = multiplier["decoder_linear"]
    local = load.rows * load.tokens // layout.cp
    slower = 1 + device.half_rows / local  # products of few rows do not fill a device
    compute = linear * passes / device.matmul_flops
    compute += attention * multiplier["decoder_attention"] / device.attention_flops
    kept = layer_kept(text, layout, kernels, load, False)
    traffic = TRAFFIC + TRAFFIC_AGAIN * (recompute.decoder == "full")
    layer = Piece(
        slower * compute / cut + passes * device.layer_seconds,
        traffic * kept / device.element_bytes,
        _tensor_seconds(model, layout, device, kernels, load, recompute),
        _context_seconds(model, layout, device, kernels, load, recompute, attention / cut),
    )
    words = padded_to(text.vocab_size, layout.tp)
    again = multiplier["lm_head"] + 1  # the backward pass of the loss computes the logits again
    head_flops = 2 * load.rows * load.tokens * text.hidden_size * words / cut
    hidden = local * text.hidden_size * kernels.element
    tp_link = link(device, layout.tp, 1, ranks)
    head = Piece(
        slower * head_flops * again / device.matmul_flops + device.layer_seconds,
        3 * 4 * local * words / layout.tp / device.element_bytes,
        3 * tp_link.gather(hidden) if layout.sp else tp_link.reduce(hidden),
    )
    together = num_microbatches if layout.tower_beside else 1
    views = load
    if together > 1:
        views = replace(load, crops=load.crops * together, globals=load.globals * together)
    tower, mean = _tower(model, layout, device, kernels, views, recompute, multiplier)
    tower, mean = tower.divided(together), mean / together
    to_next = link(device, 2, layout.tp * layout.cp * layout.dp, ranks)
    border = 0.0
    if layout.pp > 1:
        sent = hidden / (layout.tp if layout.sp else 1)
        border = 2 * (sent / to_next.rate + device.transfer_seconds)
    return Rates(layer, tower, mean, head, border)


def _tensor_seconds(model, layout, device, kernels, load, recompute) -> float:
    """Collectives of one decoder layer over TP, not overlapped."""
    if layout.tp == 1:
        return 0.0
    ring = link(device, layout.tp, 1, layout.world_size)
    hidden = load.rows * load.tokens // layout.cp * model.text.hidden_size * kernels.element
    forward = 4 * ring.gather(hidden) if layout.sp else 2 * ring.reduce(hidden)
    backward = forward + (2 * ring.gather(hidden) if layout.sp else 0.0)
    return forward * (1 + (recompute.decoder == "full")) + backward


def _context_seconds(model, layout, device, kernels, load, recompute, attention_flops: float) -> float:
    """Exchange of K and V of one decoder layer; the ring hides behind attention, the gathering does not."""
    if layout.cp == 1:
        return 0.0
    ring = link(device, layout.cp, layout.tp, layout.world_size)
    groups = max(model.text.num_query_groups // layout.tp, 1)
    both = 2 * groups * model.text.kv_channels * kernels.element * load.rows * load.tokens
    once = ring.gather(both) + (layout.cp - 2) * ring.latency * kernels.ring
    again = recompute.decoder != "none"
    if not kernels.ring:
        return once * (2 + again)
    exposed = max(0.0, once - attention_flops / device.attention_flops)
    backward = max(0.0, 2 * once - 2 * attention_flops / device.attention_flops)
    return exposed * (1 + again) + backward + 3 * ring.latency


def _tower(
    model, layout, device, kernels, load, recompute, multiplier: Mapping[str, int]
) -> tuple[Piece, float]:
    """(heaviest share, seconds of the mean share) of tower, projector and the exchange of features."""
    if not load.crops + load.globals:
        return Piece(0.0, 0.0), 0.0
    vision, split = model.vision, layout.tp if layout.placement == "tensor" else 1
    patches = (vision.crop_grid**2, vision.global_grid**2)
    tokens = (vision.crop_tokens, vision.global_tokens)
    again = (recompute.vision == "full") + (recompute.vision_chunk_views is not None)
    traffic = TRAFFIC + TRAFFIC_AGAIN * again if not model.freeze_vision else 1.0
    compute, element = [], []
    for kind in (CROP, GLOBAL):
        flops = view_flops(model, kind)
        attention = flops["vision_attention"] * multiplier["vision_attention"]
        others = sum(flops[part] * multiplier[part] for part in TOWER_PARTS) - attention
        compute.append((others / device.matmul_flops + attention / device.attention_flops) / split)
        kept = vision.num_layers * block_kept(vision, patches[kind], 1, split, kernels)
        element.append(traffic * kept / device.element_bytes)
    shares = set(view_shares(load.crops, load.globals, layout.vision_size, view_costs(model)))
    mine = max(shares, key=lambda share: _dot(share, compute) + _dot(share, element))
    launches = sum(map(bool, mine)) * vision.num_layers * multiplier["vision_linear"] * device.layer_seconds
    tensor = context = 0.0
    if split > 1:
        ring = link(device, split, 1, layout.world_size)
        width = _dot(mine, patches) * vision.hidden_size * kernels.element
        passes = 2 * (multiplier["vision_linear"] - 1) if not model.freeze_vision else 2
        tensor = vision.num_layers * passes * ring.reduce(width)
    all_views = (load.crops, load.globals)
    ranks = layout.vision_size if layout.tower_beside else layout.tp * layout.cp
    if ranks > 1:  # each feature goes to the rank that holds its position, its gradient back
        owners = layout.cp * (layout.tp if layout.sp else 1)
        features = _dot(all_views, tokens) * model.text.hidden_size * kernels.element
        # ranks of several stages are as far apart as the stages
        stride = layout.dp if layout.tower_beside and layout.pp > 1 else 1
        group = link(device, ranks, stride, layout.world_size)
        context = 2 * group.gather(features / min(layout.vision_size, owners))
    most = Piece(_dot(mine, compute) + launches, _dot(mine, element), tensor, context)
    return most, (_dot(all_views, compute) + _dot(all_views, element)) / layout.vision_size


def _dot(counts: Sequence[float], values: Sequence[float]) -> float:
    return sum(count * value for count, value in zip(counts, values))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. bubble: waiting of the busiest pipeline rank for others, within `total`."""

    total: float
    bubble: float


def pipeline_seconds(
    chunks: Sequence[float], pp: int, num_microbatches: int, border: float
) -> tuple[float, float]:
    """(seconds of a step's pipeline, of which the busiest rank waits) from seconds of each chunk per micro-batch.

    chunks: in pipeline order. At any time the ranks of a step work on chunks of one virtual stage, so that its
    slowest one sets the pace; filling and emptying takes one pass through the others. With one virtual stage the
    hidden states are exchanged between the passes, interleaved they travel while a rank computes.
    """
    vpp = len(chunks) // pp
    pace = sum(max(chunks[v * pp : (v + 1) * pp]) for v in range(vpp)) + border * (vpp == 1)
    busy = max(sum(chunks[rank::pp]) for rank in range(pp))
    fill = (sum(chunks) - busy) / vpp + (pp - 1) * border
    total = num_microbatches * pace + fill
    return total, total - num_microbatches * busy


def step_seconds(
    layout: Layout, device: Device, found: Rates, counts: Sequence[int], num_microbatches: int, closing: float
) -> StepTime:
    """A step of this layout. counts: decoder layers of each chunk in pipeline order. closing: `closing_seconds`."""
    layer = found.layer.total
    chunks = [count * layer for count in counts]
    if not layout.tower_beside:
        chunks[0] += found.tower.total
    chunks[-1] += found.head.total
    total, bubble = pipeline_seconds(chunks, layout.pp, num_microbatches, found.border)
    if device.on_cpu:  # ranks that wait leave the cores to others
        tower = 0.0 if layout.tower_beside else found.tower.own
        own = sum(counts) * found.layer.own + tower + found.head.own
        busy = num_microbatches * own * layout.world_size / layout.pp / device.processors
        total = max(total, busy + num_microbatches * (sum(chunks) - own) / layout.pp)
    if layout.tower_beside:  # before the pipeline and after it, all ranks at once
        crowd = max(1.0, layout.world_size / device.processors) if device.on_cpu else 1.0
        total += num_microbatches * (found.tower.own * crowd + found.tower.total - found.tower.own)
    return StepTime(total + closing, bubble)


def step_parts(
    layout: Layout, found: Rates, counts: Sequence[int], num_microbatches: int, time: StepTime,
    closing: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    """What a step's seconds are made of on the busiest pipeline rank; collectives apart from compute, and the rest,
    in which it waits."""
    last = len(counts) - 1
    ranks: list[list[Piece]] = [[] for _ in range(layout.pp)]
    for chunk, count in enumerate(counts):
        ranks[chunk % layout.pp] += (
            [found.layer] * count
            + [found.tower] * (chunk < layout.pp if layout.tower_beside else chunk == 0)
            + [found.head] * (chunk == last)
        )
    mine = max(ranks, key=lambda pieces: sum(piece.total for piece in pieces))
    parts = dict.fromkeys(("decoder", "tower", "head", "tp", "cp"), 0.0)
    for piece in mine:
        name = "tower" if piece is found.tower else "head" if piece is found.head else "decoder"
        parts[name] += num_microbatches * piece.own
        parts["tp"] += num_microbatches * piece.tensor
        parts["cp"] += num_microbatches * piece.context
    waiting = time.total - sum(parts.values()) - sum(closing.values())
    return parts | {"waiting": max(0.0, waiting)} | dict(closing)


def closing_seconds(
    model: ModelConfig,
    layout: Layout,
    device: Device,
    state: Sequence[RankBytes],
    weight_bytes: int,
    distributed: bool,
    tower: RankBytes | None = None,
) -> dict[str, float]:
    """What follows the last micro-batch: sums of gradients over DP x CP (and the tower's over TP, or in placement `all`
    over all ranks), the optimizer, and the gathering of weights. state: of stages, the slowest of which counts; tower:
    of one beside them."""
    shards = layout.dp * layout.cp
    ring = link(device, shards, layout.tp, layout.world_size)
    over_tp = link(device, layout.tp, 1, layout.world_size)
    counts = parameters(model)
    sums, updates = [], []
    for stage, held in enumerate(state):
        elements = held.gradients // GRADIENT_BYTES
        if distributed:
            seconds = ring.gather(held.gradients) + ring.gather(weight_bytes * elements)
        else:
            seconds = ring.reduce(held.gradients)
        if stage == 0 and layout.tp > 1 and layout.placement == "data" and not model.freeze_vision:
            seconds += over_tp.reduce(GRADIENT_BYTES * (counts["vision"] + counts["projector"]))
        owned = elements / shards if distributed else elements
        sums.append(seconds)
        traffic = OPTIMIZER_TRAFFIC * owned + GRADIENT_TRAFFIC * elements
        crowd = layout.world_size / device.processors if device.on_cpu else 1.0
        updates.append(traffic / device.element_bytes * max(1.0, crowd))
    closing = {"dp": max(sums), "optimizer": max(updates)}
    if tower is None:
        return closing
    elements = tower.gradients // GRADIENT_BYTES
    everyone = link(device, layout.world_size, 1, layout.world_size)
    if distributed:
        closing["dp"] += everyone.gather(tower.gradients) + everyone.gather(weight_bytes * elements)
    else:
        closing["dp"] += everyone.reduce(tower.gradients)
    owned = elements / layout.world_size if distributed else elements
    closing["optimizer"] += (OPTIMIZER_TRAFFIC * owned + GRADIENT_TRAFFIC * elements) / device.element_bytes
    return closing
