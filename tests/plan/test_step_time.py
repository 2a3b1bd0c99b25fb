"""Seconds of a step: formulas by hand, and the directions in which settings must move them."""

from dataclasses import replace

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.plan.cost import sample_flops, train_flops
from megatron_vl.plan.devices import DEVICES
from megatron_vl.plan.kept import Load
from megatron_vl.plan.kernels import kernels_of
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.step_time import link, pipeline_seconds, rates, step_parts, step_seconds

H100 = DEVICES["H100"]
IDEAL = replace(
    H100, matmul_flops=1e15, attention_flops=1e15, half_rows=0, element_bytes=1e30, intra_bytes=1e30,
    inter_bytes=1e30, collective_seconds=0, inter_seconds=0, transfer_seconds=0,
)  # fmt: skip
KERNELS = kernels_of("transformer_engine", 2, on_cpu=False)
NONE = RecomputeConfig()
MODEL = ModelConfig()


def test_one_rank_without_overheads_does_the_flops_of_the_cost_model():
    load = Load(1, 4096, 6, 1)
    found = rates(MODEL, Layout(), IDEAL, KERNELS, load, NONE)
    time = step_seconds(Layout(), IDEAL, found, [36], 3, 0.0)
    by_part = train_flops(MODEL, sample_flops(MODEL, [0] * 6 + [1], [4096]))
    again = by_part["lm_head"] / 3  # the loss computes its logits again
    assert time.total == pytest.approx(3 * (sum(by_part.values()) + again) / 1e15)


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, cp=4), Layout(tp=8, sp=True, placement="tensor"), Layout(cp=2, dp=4)]
)
def test_ranks_share_the_work_where_nothing_else_costs(layout):
    load, shares = Load(8, 4096, 48, 8), layout.tp * layout.cp
    alone = rates(MODEL, Layout(), IDEAL, KERNELS, load, NONE)
    found = rates(MODEL, layout, IDEAL, KERNELS, load, NONE)
    assert found.layer.total == pytest.approx(alone.layer.total / shares)
    assert found.tower.total == pytest.approx(alone.tower.total / shares)
    assert found.head.total == pytest.approx(alone.head.total / shares, rel=1e-4)


def test_a_tower_on_every_stage_takes_its_share_before_the_pipeline():
    """Four equal stages and 8 micro-batches of 7 views: the tower's time by hand, and that of `data` on one stage."""
    load, layout = Load(1, 4096, 6, 1), Layout(pp=4, placement="all")
    found = rates(MODEL, layout, IDEAL, KERNELS, load, NONE, 8)
    alone = rates(MODEL, Layout(), IDEAL, KERNELS, load, NONE)
    assert found.tower_mean == pytest.approx(alone.tower.total / 4)
    assert found.tower_mean <= found.tower.total < 1.1 * found.tower_mean
    time = step_seconds(layout, IDEAL, found, [9] * 4, 8, 0.0).total
    pipeline, _ = pipeline_seconds(
        [*[9 * found.layer.total] * 3, 9 * found.layer.total + found.head.total], 4, 8, 0
    )
    assert time == pytest.approx(pipeline + 8 * found.tower.total)
    data = rates(MODEL, Layout(pp=4), IDEAL, KERNELS, load, NONE)
    assert step_seconds(Layout(pp=4), IDEAL, data, [9] * 4, 8, 0.0).total > 1.6 * time


def test_the_pipeline_by_hand():
    total, waiting = pipeline_seconds([2.0] * 4, 4, 8, 0.0)
    assert (total, waiting) == (pytest.approx(2 * (8 + 3)), pytest.approx(2 * 3))
    total, waiting = pipeline_seconds(
        [1.0] * 8, 4, 8, 0.0
    )  # the same work in two virtual stages: half the bubble
    assert (total, waiting) == (pytest.approx(8 * 2 + 3), pytest.approx(3))
    total, _ = pipeline_seconds([5.0, 1.0, 1.0, 1.0], 4, 8, 0.0)
    assert total == pytest.approx(8 * 5 + 3)
    assert pipeline_seconds([2.0], 1, 8, 0.0) == (16.0, 0.0)


def test_links():
    inside, outside = link(H100, 8, 1, 64), link(H100, 8, 8, 64)
    assert inside.rate == H100.intra_bytes and outside.rate == H100.inter_bytes
    assert link(H100, 16, 4, 64).rate == 2 * H100.inter_bytes  # two members in each node, two network cards
    assert link(H100, 64, 1, 64).rate == min(8 * H100.inter_bytes, H100.intra_bytes)
    assert inside.gather(8e9) == pytest.approx(7e9 / H100.intra_bytes + H100.collective_seconds)
    assert inside.reduce(8e9) == 2 * inside.gather(8e9)
    assert link(H100, 1, 8, 64).gather(8e9) == 0.0


@pytest.mark.parametrize("layout", [Layout(pp=4, dp=2), Layout(tp=2, pp=2, vpp=3, sp=True), Layout(cp=8)])
def test_parts_sum_to_the_step(layout):
    load, closing = Load(1, 8192, 12, 2), {"dp": 0.5, "optimizer": 0.25}
    found = rates(MODEL, layout, H100, KERNELS, load, NONE)
    counts = [36 // layout.num_chunks] * layout.num_chunks
    time = step_seconds(layout, H100, found, counts, 16, 0.75)
    parts = step_parts(layout, found, counts, 16, time, closing)
    assert sum(parts.values()) == pytest.approx(time.total)
    assert min(parts.values()) >= 0 and time.bubble <= time.total


def test_directions():
    load, base = Load(1, 4096, 12, 2), Layout(tp=2)
    plain = rates(MODEL, base, H100, KERNELS, load, NONE)
    full = rates(MODEL, base, H100, KERNELS, load, RecomputeConfig(decoder="full", vision="full"))
    assert full.layer.total > plain.layer.total and full.tower.total > plain.tower.total
    assert rates(MODEL, Layout(), H100, KERNELS, load, NONE).layer.tensor == 0 < plain.layer.tensor
    frozen = replace(MODEL, freeze_vision=True)
    assert rates(frozen, base, H100, KERNELS, load, NONE).tower.total < plain.tower.total / 2
    packed = replace(load, documents=(512,) * 8)
    assert rates(MODEL, base, H100, KERNELS, packed, NONE).layer.compute < plain.layer.compute


def test_text_decoders_come_out_where_they_were_published():
    """Megatron-Core at 41-48% MFU in bf16; here the decoder of 8B alone, 8,192 tokens, one H100."""
    load = Load(1, 8192)
    found = rates(MODEL, Layout(), H100, KERNELS, load, NONE)
    time = step_seconds(Layout(), H100, found, [36], 1, 0.0)
    flops = sum(train_flops(MODEL, sample_flops(MODEL, [], [8192])).values())
    assert 0.40 < flops / time.total / H100.peak_flops < 0.55
