"""What follows the last micro-batch of a step: sums of gradients, the optimizer, gathering of weights; and what hides.

Overlapped (`plan/overlap.py`), the buckets of the first stage's first chunk are summed beside the backward pass of its
last micro-batch, and weights come in beside the forward pass of the next one. Taken as a hiding place is computation
of decoder layers alone: not the tower's, which some ranks have no views for, not the head's, and no time in which
other collectives use the same links. What stands in full: the bucket that is filled last, the tower's, which are sent
behind the backward pass (`parallel/data_parallel.py`), the sum of the tower's gradients over TP; of the weights those
that are needed before the first decoder layer. On later stages, overlapped or not, sums begin while stages before them
still compute their last backward pass, and weights may arrive while those compute the next forward pass. That
collectives slow the computation beside them is not modelled; on a CPU, where both share the cores, nothing hides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig
from megatron_vl.plan.cost import parameters
from megatron_vl.plan.devices import Device
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.links import Link, link
from megatron_vl.plan.overlap import Overlap
from megatron_vl.plan.state_bytes import GRADIENT_BYTES, Buckets, RankBytes

OPTIMIZER_TRAFFIC = (
    28  # bytes per owned element: gradient, fp32 weight and moments read and written, weight written
)
GRADIENT_TRAFFIC = 12  # bytes per element of the buffer: zeroed, scaled by the token count, read for the norm


@dataclass(frozen=True)
class StageEnd:
    """Seconds of one pipeline stage, nothing hidden.

    sums, gathers: of the decoder's gradients, and of all weights; last: of the decoder's bucket that is filled last;
    late: of buckets with weights of the tower; over_tp: sum of the tower's gradients; ahead: of the weights that come
    before the first decoder layer's.
    """

    stage: int
    sums: float
    last: float
    late: float
    over_tp: float
    gathers: float
    ahead: float
    optimizer: float


@dataclass(frozen=True)
class Closing:
    """The ends of those stages that can be the last to be ready. tower: seconds of one beside the stages."""

    ends: Sequence[StageEnd]
    tower: Mapping[str, float]


def closing_of(
    model: ModelConfig,
    layout: Layout,
    device: Device,
    state: Mapping[int, tuple[RankBytes, Buckets]],
    weight_bytes: int,
    distributed: bool,
    tower: RankBytes | None = None,
) -> Closing:
    """state: of stages by their number. tower: of one beside them, in placement `all`."""
    ring = link(device, layout.dp * layout.cp, layout.tp, layout.world_size)
    over_tp = link(device, layout.tp, 1, layout.world_size)
    counts = parameters(model)
    tower_weights = GRADIENT_BYTES * (counts["vision"] + counts["projector"])
    crowd = max(1.0, layout.world_size / device.processors) if device.on_cpu else 1.0
    ends = []
    for stage, (held, buckets) in state.items():
        elements = held.gradients // GRADIENT_BYTES

        def summed(size: int, calls: int = 1) -> float:
            return _summed(ring, GRADIENT_BYTES * size, distributed, calls)

        def gathered(size: int, calls: int = 1) -> float:
            if not distributed or ring.size == 1:
                return 0.0
            return ring.gather(weight_bytes * size) + (calls - 1) * ring.latency

        shared = stage == 0 and layout.tp > 1 and layout.placement == "data" and not model.freeze_vision
        late = summed(buckets.late, buckets.late_count) if buckets.late else 0.0
        ends.append(
            StageEnd(
                stage,
                summed(elements - buckets.late, buckets.count - buckets.late_count),
                summed(buckets.last),
                late,
                over_tp.reduce(tower_weights) if shared else 0.0,
                gathered(elements, buckets.count),
                gathered(buckets.ahead),
                _update_seconds(device, elements, layout.dp * layout.cp if distributed else 1, crowd),
            )
        )
    if tower is None:
        return Closing(ends, {})
    elements, everyone = (
        tower.gradients // GRADIENT_BYTES,
        link(device, layout.world_size, 1, layout.world_size),
    )
    seconds = _summed(everyone, tower.gradients, distributed, 1)
    seconds += everyone.gather(weight_bytes * elements) if distributed else 0.0
    shards = layout.world_size if distributed else 1
    return Closing(ends, {"dp": seconds, "optimizer": _update_seconds(device, elements, shards, 1.0)})


def _summed(ring: Link, size: int, distributed: bool, calls: int) -> float:
    if ring.size == 1:
        return 0.0
    return (ring.gather(size) if distributed else ring.reduce(size)) + (calls - 1) * ring.latency


def _update_seconds(device: Device, elements: int, shards: int, crowd: float) -> float:
    traffic = OPTIMIZER_TRAFFIC * elements / shards + GRADIENT_TRAFFIC * elements
    return traffic / device.element_bytes * crowd


def closing_seconds(
    closing: Closing, overlap: Overlap, on_cpu: bool, forward: Sequence[float], backward: Sequence[float]
) -> dict[str, float]:
    """Seconds by part that nothing hides. forward, backward: of the decoder layers of each rank's first chunk, one
    micro-batch, in pipeline order."""
    sums = gathers = optimizer = 0.0
    for end in closing.ends:
        its_sums, its_gathers = end.sums, end.gathers
        if end.stage and not on_cpu:
            its_sums = max(0.0, its_sums - sum(backward[: end.stage]))
            its_gathers = max(0.0, its_gathers - sum(forward[: end.stage]))
        elif not on_cpu:
            if overlap.grad_reduce:
                its_sums = max(end.last, its_sums - backward[0])
            if overlap.param_gather:
                its_gathers = max(end.ahead, its_gathers - forward[0])
        sums = max(sums, its_sums + end.late + end.over_tp)
        gathers = max(gathers, its_gathers)
        optimizer = max(optimizer, end.optimizer)
    beside = closing.tower
    return {
        "dp": sums + gathers + beside.get("dp", 0.0),
        "optimizer": optimizer + beside.get("optimizer", 0.0),
    }
