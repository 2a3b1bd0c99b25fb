"""Memory of a stage: what is in flight, what comes and goes, which rank is the fullest."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.kept import (
    Load,
    fullest_load,
    heaviest,
    kept_by_chunk,
    layer_kept,
    layer_moved,
    view_shares,
)
from megatron_vl.plan.kernels import kernels_of
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.loss_chunk import loss_chunk_tokens
from megatron_vl.plan.memory import PARTS, Setting, memory_of_stage, setting_of, workspace
from megatron_vl.plan.report import memory_lines
from megatron_vl.plan.stages import plan_stages
from megatron_vl.plan.state_bytes import bytes_of_stage

MODEL = ModelConfig()
KERNELS = kernels_of("transformer_engine", 2, on_cpu=False)
EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = Setting(MODEL, KERNELS, RecomputeConfig(), Load(1, 4096, 6, 1), num_microbatches=16, weight_bytes=2)


def test_parts_of_every_stage():
    layout, stages = Layout(pp=4, dp=2), plan_stages(36, 4)
    found = [memory_of_stage(BASE, layout, chunks) for chunks in stages]
    assert all(tuple(parts) == PARTS for parts in found)
    assert [parts["tower"] > 0 for parts in found] == [True, False, False, False]
    assert [parts["loss"] > 0 for parts in found] == [False, False, False, True]
    for chunks, parts in zip(stages, found):
        state = bytes_of_stage(MODEL, layout, chunks)
        assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (
            state.weights, state.gradients, state.optimizer,
        )  # fmt: skip
    one = kept_by_chunk(MODEL, layout, stages[1][0], KERNELS, BASE.load, BASE.recompute, Coords(0, 0, 0, 1))
    assert [parts["decoder"] // one["decoder"] for parts in found] == [4, 3, 2, 1]
    few = [memory_of_stage(replace(BASE, num_microbatches=2), layout, chunks) for chunks in stages]
    assert [parts["decoder"] // one["decoder"] for parts in few] == [2, 2, 2, 1]


def test_interleaving_holds_more():
    plain = memory_of_stage(BASE, Layout(pp=4), plan_stages(36, 4)[0])
    twice = memory_of_stage(BASE, Layout(pp=4, vpp=3), plan_stages(36, 4, 3)[0])
    assert twice["decoder"] > plain["decoder"] and twice["pipeline"] > plain["pipeline"]


def test_recomputation_takes_activations_off():
    layout, chunks = Layout(tp=2, sp=True), plan_stages(36, 1)[0]
    full = replace(BASE, recompute=RecomputeConfig(decoder="full", vision="full"))
    none, less = (memory_of_stage(setting, layout, chunks) for setting in (BASE, full))
    assert less["decoder"] < none["decoder"] / 10 and less["tower"] < none["tower"] / 10
    groups = replace(full, recompute=replace(full.recompute, decoder_num_layers=6))
    more = memory_of_stage(groups, layout, chunks)
    assert more["decoder"] < less["decoder"] and more["workspace"] > less["workspace"]


def test_the_loss_needs_one_chunk_of_logits():
    chunks, layout = plan_stages(36, 2)[1], Layout(pp=2)
    words, tokens = 151_936, 4096
    expected = loss_chunk_tokens(words) * words * (4 + 2 * 2) + 2 * tokens * 4096 * 2
    assert workspace(BASE, layout, chunks) == pytest.approx(expected)
    assert workspace(replace(BASE, loss_chunk=4096), layout, chunks) > 7 * expected


def test_the_fullest_rank_has_the_most_patches():
    load = Load(1, 4096, 5, 1)
    shares = view_shares(5, 1, 4, view_costs(MODEL))
    assert sum(crops for crops, _ in shares) == 5 and sum(whole for _, whole in shares) == 1
    most = heaviest(MODEL, load, 4)
    patches = [1296 * crops + 2704 * whole for crops, whole in shares]
    assert 1296 * most[0] + 2704 * most[1] == max(patches)


def test_frozen_parts_keep_nothing():
    frozen = replace(BASE, model=replace(MODEL, freeze_vision=True, freeze_decoder=True))
    found = memory_of_stage(frozen, Layout(dp=8), plan_stages(36, 1)[0])
    plain = memory_of_stage(BASE, Layout(dp=8), plan_stages(36, 1)[0])
    assert found["tower"] < plain["tower"] / 100 and found["decoder"] < plain["decoder"]
    assert found["gradients"] < plain["gradients"] / 100


def test_a_chunk_of_views_is_alive_at_once():
    layout, chunks = Layout(tp=2, sp=True), plan_stages(36, 1)[0]
    base = replace(
        BASE, load=Load(1, 32768, 128, 32), recompute=RecomputeConfig(decoder="full", vision="full")
    )
    ones, eights = (
        replace(base, recompute=replace(base.recompute, vision_chunk_views=views)) for views in (1, 8)
    )
    whole, one, eight = (memory_of_stage(setting, layout, chunks) for setting in (base, ones, eights))
    assert one["tower"] == eight["tower"] < whole["tower"] / 20
    assert one["workspace"] <= eight["workspace"] <= whole["workspace"]
    more = replace(ones, load=Load(1, 32768, 64, 16))
    assert memory_of_stage(more, layout, chunks)["workspace"] == one["workspace"]


def test_what_is_offloaded_is_not_on_the_device():
    """Tensors from 1 MiB leave. One layer's are on their way, or what copies have fallen behind by."""
    layout, chunks = Layout(), plan_stages(36, 1)[0]
    plain, away = (replace(BASE, recompute=RecomputeConfig(offload=offload)) for offload in (False, True))
    kept, left = (memory_of_stage(setting, layout, chunks) for setting in (plain, away))
    text, load = MODEL.text, BASE.load
    stays, moved = layer_moved(text, layout, KERNELS, load, False)
    ids, slots = 8 * 4096, layer_kept(text, layout, KERNELS, load, False)
    assert left["decoder"] == 36 * stays + ids and kept["decoder"] == 36 * slots + ids
    assert left["decoder"] < 0.4 * kept["decoder"]
    assert left["tower"] == kept["tower"] and left["weights"] == kept["weights"]
    inner = 2 * 4096 * 2 * text.ffn_hidden_size * 2
    assert workspace(away, layout, chunks) == max(inner + moved, workspace(plain, layout, chunks))
    slow = replace(away, waiting=moved / 2)
    assert workspace(slow, layout, chunks) == inner + 18 * moved
    few = Load(1, 32)
    assert layer_moved(text, layout, KERNELS, few, False) == (
        layer_kept(text, layout, KERNELS, few, False),
        0,
    )


def test_pixels_wait_as_bytes_or_as_floats():
    views = replace(BASE, recompute=RecomputeConfig(vision_chunk_views=2))
    layout, stage, coords = Layout(), plan_stages(36, 1)[0][0], Coords(0, 0, 0, 0)
    sizes = [
        kept_by_chunk(MODEL, layout, stage, kernels, views.load, views.recompute, coords)["vision"]
        for kernels in (KERNELS, replace(KERNELS, pixel=1))
    ]
    assert sizes[0] - sizes[1] == 3 * 3 * (6 * 504**2 + 728**2)


def test_gathered_keys_pass():
    layout, chunks = Layout(cp=32), plan_stages(36, 1)[0]
    ring = replace(BASE, load=Load(1, 131072))
    gathered = replace(ring, kernels=kernels_of("transformer_engine", 2, False, "all_gather"))
    more, less = (memory_of_stage(setting, layout, chunks) for setting in (gathered, ring))
    assert more["workspace"] > less["workspace"] and more["decoder"] == less["decoder"]


@pytest.mark.parametrize(
    ("name", "world_size", "steps", "warm"),
    [
        ("step3_vl_10b_stage1", 64, 45_300, 200),
        ("step3_vl_10b_stage2", 64, 8_584, 200),
        ("step3_vl_10b_8gpu", 8, 2_000, 100),
    ],
)
def test_the_sft_examples_fit_80_gb_cards_with_a_tenth_free(name, world_size, steps, warm):
    loaded = load_checked_run(str(EXAMPLES / "sft" / f"{name}.yaml"), [], None, world_size)
    config = loaded.config
    layout = Layout.from_config(config.parallel, world_size)
    setting = setting_of(config, layout, fullest_load(config), weight_bytes=2, on_cpu=False)
    for chunks in plan_stages(config.model.text.num_layers, layout.pp, layout.vpp):
        assert sum(memory_of_stage(setting, layout, chunks).values()) < 0.9 * 80e9
    per_step = config.train.global_batch_size * config.data.seq_length
    assert config.train.global_batch_size == 32 and config.schedule.warmup_tokens == warm * per_step
    assert -(-config.schedule.total_tokens // per_step) == steps
    assert config.data.packing.enabled and config.data.packing.overlong == "split_turns"
    lines = memory_lines(config, layout)
    assert lines[0].startswith("Memory per rank at the height of a step, planned for rows of")


def test_the_published_stages():
    stages = [
        load_checked_run(str(EXAMPLES / "sft" / f"step3_vl_10b_stage{n}.yaml"), [], None, 64).config
        for n in (1, 2)
    ]
    for config, share, tokens in zip(stages, (0.9, 0.5), (190e9, 36e9)):
        (phase,) = config.schedule.phases
        assert (phase.tokens, phase.lr_start, phase.lr_end, phase.style) == (tokens, 1e-4, 1e-5, "cosine")
        assert config.data.seq_length == 131072 and config.data.mixture[0].text_share == share
    assert stages[1].train.init_from == stages[0].run_dir and stages[0].run_dir != stages[1].run_dir
    same = replace(stages[1], data=stages[0].data, schedule=stages[0].schedule, train=stages[0].train)
    assert replace(same, run_dir=stages[0].run_dir) == stages[0], "nothing else differs"
