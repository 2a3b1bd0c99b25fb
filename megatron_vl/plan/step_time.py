"""Predicted seconds of an optimizer step: compute by part, collectives by link, pipeline bubbles, balance of views.

Compute is the cost model's FLOPs over what a device reaches (`plan/devices.py`), plus the memory traffic of
element-wise work: counted for the tower (`plan/traffic.py`), for decoder layers a multiple of the bytes that one keeps,
and counted casts where its products are in FP8. Nothing that this trainer does not overlap is taken as hidden:
tensor-parallel collectives stand in full. What follows the last micro-batch is in `plan/closing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.plan.cost import (
    TOWER_PARTS,
    decoder_layer_flops,
    train_multipliers,
    view_costs,
    view_flops,
)
from megatron_vl.plan.devices import Device
from megatron_vl.plan.exchange import exchange_of
from megatron_vl.plan.kept import SMALLEST_MOVED, Load, hidden_bytes, layer_kept, layer_moved, view_shares
from megatron_vl.plan.kernels import Kernels
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.links import link
from megatron_vl.plan.tensors import padded_to
from megatron_vl.plan.traffic import layer_casts, tower_traffic
from megatron_vl.plan.vision_share import CROP, GLOBAL

TRAFFIC = 2.0  # element-wise reads and writes of a decoder layer per kept byte, forward, and backward as many


@dataclass(frozen=True)
class Piece:
    """Seconds of a micro-batch, forward and backward, by kind. host: waiting for off-loaded activations."""

    compute: float
    element: float
    tensor: float = 0.0
    context: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all kinds."""
        return self.compute + self.element + self.tensor + self.context + self.host

    @property
    def own(self) -> float:
        """Without collectives and the host."""
        return self.compute + self.element

    def times(self, factor: float) -> Piece:
        """So many of it."""
        return Piece(
            self.compute * factor, self.element * factor, self.tensor * factor, self.context * factor,
            self.host * factor,
        )  # fmt: skip

    def __add__(self, other: Piece) -> Piece:
        return Piece(
            self.compute + other.compute, self.element + other.element, self.tensor + other.tensor,
            self.context + other.context, self.host + other.host,
        )  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What the parts of a micro-batch cost on a rank of a layout.

    layer: one decoder layer, the mean of those in FP8 and those that are not; forward: of its own seconds those of
    the forward pass. tower: the heaviest share of the views; tower_mean: the mean share; in placement `all` of
    a whole step, over the number of its micro-batches. head: loss included.
    border: seconds of a hidden state between two stages, forward and back. waiting: bytes that a decoder layer
    off-loads and that have not left when its forward pass ends.
    """

    layer: Piece
    forward: float
    tower: Piece
    tower_mean: float
    head: Piece
    border: float
    waiting: float = 0.0


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
    local = load.rows * load.tokens // layout.cp
    slower = 1 + device.half_rows / local  # products of few rows do not fill a device
    small = len(kernels.fp8) / text.num_layers
    of_layer = (model, layout, device, kernels, load, recompute, multiplier, slower)
    layer, forward = _layer(*of_layer, quantised=small > 0)
    if 0 < small < 1:  # a mean layer
        other, its_forward = _layer(*of_layer, quantised=False)
        layer, forward = (
            layer.times(small) + other.times(1 - small),
            small * forward + (1 - small) * its_forward,
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
    tower, mean = tower.times(1 / together), mean / together
    to_next = link(device, 2, layout.tp * layout.cp * layout.dp, ranks)
    border = 0.0
    if layout.pp > 1:
        sent = hidden / (layout.tp if layout.sp else 1)
        border = 2 * (sent / to_next.rate + device.transfer_seconds)
    waiting = 0.0
    if recompute.offload and not device.on_cpu:
        moved = moved_of_layer(model, layout, kernels, load, recompute, small > 0)
        waiting = max(0.0, moved - forward * device.host_bytes)
    return Rates(layer, forward, tower, mean, head, border, waiting)


def _layer(
    model, layout, device, kernels, load, recompute, multiplier: Mapping[str, int], slower: float, quantised: bool
) -> tuple[Piece, float]:  # fmt: skip
    """(one decoder layer, seconds of its forward pass without collectives)."""
    text, cut = model.text, layout.tp * layout.cp
    lengths = load.documents or (load.tokens,)
    linear, attention = decoder_layer_flops(model, lengths * load.rows, load.rows * load.tokens)
    passes, again = multiplier["decoder_linear"], recompute.decoder == "full"
    rate = device.matmul_flops_fp8 if quantised and device.matmul_flops_fp8 else device.matmul_flops
    products, sums = slower * linear / rate / cut, slower * attention / device.attention_flops / cut
    traffic = TRAFFIC * layer_kept(text, layout, kernels, load, False)
    forward, backward = traffic, traffic * (1 + again)
    if quantised:
        local = load.rows * load.tokens // layout.cp
        casts = layer_casts(text, layout.tp, local, kernels.element, not model.freeze_decoder)
        forward, backward = forward + casts.forward, backward + casts.backward + again * casts.forward
    one_pass = products + sums + device.layer_seconds + forward / device.element_bytes
    moved = moved_of_layer(model, layout, kernels, load, recompute, quantised)
    compute = products * passes + sums * multiplier["decoder_attention"] + passes * device.layer_seconds
    element = (forward + backward) / device.element_bytes
    found = Piece(
        compute,
        element,
        _tensor_seconds(model, layout, device, kernels, load, recompute, quantised),
        _context_seconds(model, layout, device, kernels, load, recompute, attention / cut),
        _host_seconds(moved, device, one_pass, compute + element),
    )
    return found, one_pass


def _host_seconds(moved: float, device: Device, forward: float, both: float) -> float:
    """What off-loading so many bytes of a layer takes beyond the computation beside it.

    Copies out go beside the forward pass, and all of them before the first one back, which go beside the backward pass;
    on a CPU beside nothing.
    """
    one_way, beside = moved / device.host_bytes, 0.0 if device.on_cpu else 1.0
    return max(0.0, one_way - beside * forward) + max(0.0, one_way - beside * (both - forward))


def moved_of_layer(model, layout, kernels, load, recompute, quantised: bool) -> float:
    """Bytes that one decoder layer sends to host memory, one way."""
    if not recompute.offload:
        return 0.0
    if recompute.decoder == "full":
        moved = hidden_bytes(model.text, layout, kernels, load)
        return moved / recompute.decoder_num_layers if moved >= SMALLEST_MOVED else 0.0
    selective, trained = recompute.decoder == "selective", not model.freeze_decoder
    return layer_moved(model.text, layout, kernels, load, selective, trained, quantised)[1]


def _tensor_seconds(model, layout, device, kernels, load, recompute, quantised: bool) -> float:
    """Collectives of one decoder layer over TP, not overlapped. In FP8 the torch layers gather tokens so."""
    if layout.tp == 1:
        return 0.0
    ring = link(device, layout.tp, 1, layout.world_size)
    hidden = load.rows * load.tokens // layout.cp * model.text.hidden_size * kernels.element
    if not layout.sp:
        return (2 + (recompute.decoder == "full")) * 2 * ring.reduce(hidden)
    inputs = hidden / kernels.element if quantised and kernels.joined_rows else hidden
    forward = 2 * ring.gather(inputs) + 2 * ring.gather(hidden)
    backward = 4 * ring.gather(hidden) + 2 * ring.gather(inputs)  # inputs are gathered again
    return forward * (1 + (recompute.decoder == "full")) + backward


def _context_seconds(model, layout, device, kernels, load, recompute, attention_flops: float) -> float:
    """Exchange of K and V of one decoder layer; the ring hides behind attention, the gathering does not."""
    if layout.cp == 1:
        return 0.0
    ring = link(device, layout.cp, layout.tp, layout.world_size)
    groups = max(model.text.num_query_groups // layout.tp, 1)
    both = 2 * groups * model.text.kv_channels * kernels.element * load.rows * load.tokens
    sent, again = exchange_of(kernels, layout.cp, both), recompute.decoder != "none"
    if not kernels.ring:
        return (sent.forward * (1 + again) + sent.backward) / ring.rate + (3 + again) * ring.latency
    turn = (layout.cp - 1) * ring.latency
    attention = attention_flops / device.attention_flops
    forward = max(0.0, sent.forward / ring.rate + turn - attention)
    backward = max(0.0, sent.backward / ring.rate + 2 * turn - 2 * attention) + sent.home / ring.rate
    return forward * (1 + again) + backward + 3 * ring.latency


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
    small = device.matmul_flops_fp8 if kernels.fp8_vision and device.matmul_flops_fp8 else device.matmul_flops
    compute = []
    for kind in (CROP, GLOBAL):
        flops = view_flops(model, kind)
        seconds = {part: flops[part] * multiplier[part] / device.matmul_flops for part in TOWER_PARTS}
        seconds["vision_linear"] *= device.matmul_flops / small
        seconds["vision_attention"] *= device.matmul_flops / device.attention_flops
        compute.append(sum(seconds.values()) / split)

    repeated, backward = (1, 0) if model.freeze_vision else (1 + again, 1)

    def element(share: tuple[int, int]) -> float:
        crops, wholes = (
            tower_traffic(vision, kind, count, split, kernels) for kind, count in zip((CROP, GLOBAL), share)
        )
        moved = repeated * (crops.forward + wholes.forward) + backward * (crops.backward + wholes.backward)
        return moved / device.element_bytes

    moves = {
        share: element(share)
        for share in set(view_shares(load.crops, load.globals, layout.vision_size, view_costs(model)))
    }
    mine = max(moves, key=lambda share: _dot(share, compute) + moves[share])
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
    most = Piece(_dot(mine, compute) + launches, moves[mine], tensor, context)
    return most, (_dot(all_views, compute) + element(all_views)) / layout.vision_size


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
    parts = dict.fromkeys(("decoder", "tower", "head", "tp", "cp", "host"), 0.0)
    for piece in mine:
        name = "tower" if piece is found.tower else "head" if piece is found.head else "decoder"
        parts[name] += num_microbatches * piece.own
        parts["tp"] += num_microbatches * piece.tensor
        parts["cp"] += num_microbatches * piece.context
        parts["host"] += num_microbatches * piece.host
    waiting = time.total - sum(parts.values()) - sum(closing.values())
    return parts | {"waiting": max(0.0, waiting)} | dict(closing)
