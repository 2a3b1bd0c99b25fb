"""The memory plan: what is kept is counted by hand once, and moves the right way with layout and recomputation."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.config.mixture import PackingConfig
from megatron_vl.config.schema import ParallelConfig, PrecisionConfig, RecomputeConfig, RunConfig
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.memory import RankMemory, memory_of_stage, microbatches_in_flight, views_of_row
from megatron_vl.plan.report import memory_lines
from megatron_vl.plan.stages import plan_stages

EXAMPLES = Path(__file__).parents[2] / "examples"
GIB = 1 << 30


def planned(config: RunConfig, world_size: int, rank: int = 0) -> RankMemory:
    layout = Layout.from_config(config.parallel, world_size)
    stages = plan_stages(config.model.text.num_layers, layout.pp, layout.vpp)
    return memory_of_stage(config, layout, stages[rank], 2)


def run(recompute=RecomputeConfig(decoder="full", vision="full"), seq_length=32768, packing=None, **parallel):  # noqa: B008
    config = RunConfig(
        parallel=ParallelConfig(**parallel), recompute=recompute, precision=PrecisionConfig("bf16")
    )
    packing = packing or PackingConfig(enabled=True, max_global_views=32, max_crops=128)
    return replace(config, data=replace(config.data, seq_length=seq_length, packing=packing))


TP8 = dict(tensor_model_parallel_size=8, sequence_parallel=True)


def test_what_full_recomputation_keeps_is_counted_by_hand():
    found = planned(run(**TP8), 8)
    boundaries = 36 * 32768 // 8 * 4096 * 2
    norms = 32768 // 8 * 4096 * 2 * (4 + 2)
    inner = 32768 * 2 * (4 * 32 * 128 + 4 * 8 * 128 + 4 * 12288) // 8
    assert found.decoder == boundaries + norms + inner + 2 * 32768 * 4096 * 2
    patches = 4 * 52**2 + 16 * 36**2
    kept = patches * 1536 * 2 * 47 + patches * 2 * 9 * (1536 // 4 + 2 * 1536 // 16)
    block = 1536 * (2 * (4 + 2) + 2 * 2) + 2 * (6 * 1536 + 3 * 8960)
    assert found.tower == kept + 16 * 36**2 * block
    assert found.total == found.states + found.decoder + found.tower + found.loss


def test_views_of_the_row_that_has_most():
    assert views_of_row(run()) == (32, 128)
    assert views_of_row(run(seq_length=4096)) == (0, 50)
    assert views_of_row(run(packing=PackingConfig(enabled=True, max_crops=100))) == (145, 100)
    assert views_of_row(run(packing=PackingConfig(max_crops=1))) == (0, 404), "dense rows know no such limit"


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(pp=1), [1]),
        (Layout(pp=4), [4, 3, 2, 1]),
        (Layout(pp=2, vpp=2), [2.5, 1.5]),
    ],
)
def test_micro_batches_in_flight(layout, expected):
    assert [microbatches_in_flight(layout, rank) for rank in range(layout.pp)] == expected


def test_less_is_kept_with_more_ranks_and_with_recomputation():
    tp8 = planned(run(**TP8), 8)
    none = planned(run(RecomputeConfig(), **TP8), 8)
    assert none.decoder > 4 * tp8.decoder and none.tower > 10 * tp8.tower and none.states == tp8.states
    cp4 = planned(run(**TP8, context_parallel_size=4), 32)
    assert cp4.decoder < tp8.decoder / 3 and cp4.tower < tp8.tower / 2 and cp4.states < tp8.states
    first, last = (planned(run(**TP8, pipeline_model_parallel_size=2), 16, rank) for rank in (0, 1))
    assert first.loss == 0 and last.tower == 0 and last.loss == tp8.loss
    frozen = run(**TP8)
    frozen = replace(frozen, model=replace(frozen.model, freeze_vision=True))
    assert planned(frozen, 8).tower < tp8.tower / 2


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
    assert planned(config, world_size).total < 0.9 * 80e9
    per_step = config.train.global_batch_size * config.data.seq_length
    assert config.train.global_batch_size == 32 and config.schedule.warmup_tokens == warm * per_step
    assert -(-config.schedule.total_tokens // per_step) == steps
    assert config.data.packing.enabled and config.data.packing.overlong == "split_turns"
    lines = memory_lines(config, Layout.from_config(config.parallel, world_size))
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
