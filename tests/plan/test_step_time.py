"""Seconds of a step: formulas by hand, and the directions in which settings must move them."""

from dataclasses import replace

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.plan.cost import decoder_layer_flops, sample_flops, train_flops
from megatron_vl.plan.devices import DEVICES
from megatron_vl.plan.kept import Load, layer_moved
from megatron_vl.plan.kernels import kernels_of
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.links import link
from megatron_vl.plan.step_time import pipeline_seconds, rates, step_parts, step_seconds
from megatron_vl.plan.traffic import cast_traffic, pixel_traffic, tower_traffic
from megatron_vl.plan.vision_share import GLOBAL

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


@pytest.mark.parametrize(
    ("backend", "exchange", "recompute", "turns"),
    [
        ("torch", "all_gather", "none", 3),
        ("torch", "all_gather", "full", 4),
        ("transformer_engine", "all_gather", "selective", 4),
        # K and V, again, and their gradients in fp32, which also travel home
        ("torch", "p2p", "none", 1 + 1 + 2 * 4 / 3),
        ("torch", "p2p", "full", 1 + 1 + 1 + 2 * 4 / 3),
        ("transformer_engine", "p2p", "none", 3),
    ],
)
def test_exchanges_of_keys_and_values_by_hand(backend, exchange, recompute, turns):
    """Where attention takes no time to hide behind, four ranks take so many turns of bf16 K and V."""
    device = replace(IDEAL, attention_flops=1e30, intra_bytes=1e9)
    kernels = kernels_of(backend, 2, False, exchange)
    found = rates(MODEL, Layout(cp=4), device, kernels, Load(1, 8192), RecomputeConfig(decoder=recompute))
    text = MODEL.text
    turn = 3 / 4 * 2 * text.num_query_groups * text.kv_channels * 2 * 8192 / 1e9
    assert found.layer.context == pytest.approx(turns * turn)


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


def test_fused_kernels_save_traffic_of_the_tower_alone():
    load, base = Load(1, 4096, 12, 2), Layout()
    twins, fused = (
        rates(MODEL, base, H100, kernels_of("torch", 2, on_cpu=False, fused=fused), load, NONE)
        for fused in (False, True)
    )
    assert twins.layer == fused.layer and twins.tower.compute == fused.tower.compute
    assert 3 < twins.tower.element / fused.tower.element < 4
    # derived in the design: bias + quick_gelu alone moves 20 GB per 728 view forward
    vision, kernels = MODEL.vision, kernels_of("torch", 2, on_cpu=False)
    one = 47 * 2704 * vision.ffn_hidden_size * 2
    forward = [
        tower_traffic(replace(vision, ffn_hidden_size=inner), GLOBAL, 1, 1, kernels).forward
        for inner in (vision.ffn_hidden_size, 0)
    ]
    assert forward[0] - forward[1] == pytest.approx(9 * one) == pytest.approx(20.5e9, rel=0.01)
    frozen = rates(replace(MODEL, freeze_vision=True), base, H100, kernels, load, NONE)
    assert frozen.tower.element < 0.5 * twins.tower.element


@pytest.mark.parametrize(
    ("projector", "per_view", "per_call"), [("gather", 168e6, 0.0), ("implicit", 0.0, 2.97e9)]
)
def test_traffic_of_the_projectors_kernels(projector, per_view, per_call):
    """Bytes as csrc/README.md derives them, forward and backward."""
    kernels = kernels_of("torch", 2, on_cpu=False, fused=True, projector=projector)
    none = replace(MODEL.vision, num_layers=0)

    def moved(count: int) -> float:
        found = tower_traffic(none, GLOBAL, count, 1, kernels)
        pixels = pixel_traffic(none, count * 2704, kernels)
        return found.forward + found.backward - pixels.forward

    assert moved(2) - moved(1) == pytest.approx(per_view, rel=0.01)
    assert 2 * moved(1) - moved(2) == pytest.approx(per_call, rel=0.01)


def test_products_in_fp8():
    load, layout = Load(1, 8192, 6, 1), Layout(tp=2, sp=True)
    ideal = replace(IDEAL, matmul_flops_fp8=2e15)
    plain = kernels_of("transformer_engine", 2, on_cpu=False)
    small = replace(plain, fp8=frozenset(range(36)))
    slow, fast = (rates(MODEL, layout, ideal, kernels, load, NONE) for kernels in (plain, small))
    linear, attention = decoder_layer_flops(MODEL, [8192])
    assert slow.layer.compute - fast.layer.compute == pytest.approx(3 * linear / 2 * (1 / 1e15 - 1 / 2e15))
    assert fast.head == slow.head and fast.tower == slow.tower
    half = rates(MODEL, layout, ideal, replace(plain, fp8=frozenset(range(18))), load, NONE)
    assert half.layer.compute == pytest.approx((slow.layer.compute + fast.layer.compute) / 2)
    tower = rates(MODEL, layout, ideal, replace(plain, fp8_vision=True), load, NONE).tower
    assert 0.55 < tower.compute / slow.tower.compute < 0.65 and tower.tensor == slow.tower.tensor
    # casting is in: with nominal rates a layer gains less than its products do; without a rate nothing
    nominal = [rates(MODEL, layout, H100, kernels, load, NONE).layer for kernels in (plain, small)]
    assert nominal[1].element > nominal[0].element and 1.1 < nominal[0].total / nominal[1].total < 1.6
    none = replace(H100, matmul_flops_fp8=0.0)
    assert rates(MODEL, layout, none, small, load, NONE).layer.compute == nominal[0].compute
    torch = [
        rates(MODEL, layout, H100, replace(k, joined_rows=True), load, NONE).layer for k in (plain, small)
    ]
    assert torch[1].tensor < torch[0].tensor, "tokens are gathered in FP8"


def test_casts_by_hand():
    """One product, 3 rows, 5 inputs, 7 outputs, bf16: measured 2 bytes, rounded 2 + 1, transposed 1 + 1."""
    found = cast_traffic(3, [(5, 7)], 2)
    assert found.forward == (15 + 35) * 5
    assert found.backward == 21 * 5 + 35 * (3 + 2) + (15 + 21) * 2
    assert cast_traffic(3, [(5, 7)], 2, trained=False).backward == 21 * 5 + 35 * 5


def test_offloading_hides_as_far_as_computation_is_long_enough():
    load, offload = Load(1, 32768), RecomputeConfig(offload=True)
    layout = Layout(tp=4, sp=True)
    plain = rates(MODEL, layout, H100, KERNELS, load, NONE).layer
    moved = layer_moved(MODEL.text, layout, KERNELS, load, False)[1]
    slow = replace(H100, host_bytes=1e9)
    found = rates(MODEL, layout, slow, KERNELS, load, offload)
    assert found.layer.host == pytest.approx(2 * moved / 1e9 - found.layer.own)
    assert found.layer.total - found.layer.host == pytest.approx(plain.total)
    assert found.waiting == pytest.approx(moved - found.forward * 1e9)
    quick = rates(MODEL, layout, replace(H100, host_bytes=1e15), KERNELS, load, offload)
    assert quick.layer.host == quick.waiting == 0
    full = rates(MODEL, layout, slow, KERNELS, load, replace(offload, decoder="full")).layer
    hidden = 32768 // 4 * 4096 * 2
    backward = full.own - found.forward
    assert full.host == pytest.approx(max(0, hidden / 1e9 - found.forward) + max(0, hidden / 1e9 - backward))
    counts, time = [36], step_seconds(layout, slow, found, [36], 2, 0.0)
    parts = step_parts(layout, found, counts, 2, time, {"dp": 0.0, "optimizer": 0.0})
    assert parts["host"] == pytest.approx(72 * found.layer.host) and sum(parts.values()) == pytest.approx(
        time.total
    )


def test_bytes_of_pixels():
    """fast: 1 byte read and 2 written by the kernel; the twin goes through fp32."""
    fused, twin = (kernels_of("torch", 2, False, fused=on, pixel=1) for on in (True, False))
    values = 10 * 3 * 14 * 14
    assert pixel_traffic(MODEL.vision, 10, fused).forward == 3 * values
    assert pixel_traffic(MODEL.vision, 10, twin).forward == 39 * values
    assert pixel_traffic(MODEL.vision, 10, replace(twin, pixel=4)).forward == 10 * values


def test_text_decoders_come_out_where_they_were_published():
    """Megatron-Core at 41-48% MFU in bf16; here the decoder of 8B alone, 8,192 tokens, one H100."""
    load = Load(1, 8192)
    found = rates(MODEL, Layout(), H100, KERNELS, load, NONE)
    time = step_seconds(Layout(), H100, found, [36], 1, 0.0)
    flops = sum(train_flops(MODEL, sample_flops(MODEL, [], [8192])).values())
    assert 0.40 < flops / time.total / H100.peak_flops < 0.55
