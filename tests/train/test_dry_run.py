"""Ranks built without memory: they are what the plan says of them, and a plan that is wrong is found."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.__main__ import main
from megatron_vl.config.schema import (
    DataConfig,
    PackingConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)
from megatron_vl.errors import ConfigError
from megatron_vl.parity.layouts import parse_layout
from megatron_vl.plan import state_bytes
from megatron_vl.plan.checks import check_run, load_checked_run
from megatron_vl.plan.devices import DEVICES
from megatron_vl.plan.plan_command import candidate_of
from megatron_vl.plan.rank_state import chosen_ranks, differences, plan_rank
from megatron_vl.plan.search import Planner, Question
from megatron_vl.train import dry_rank, dry_run
from tests.fixtures.small import SMALL

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples/pretrain/step3_vl_10b.yaml")

# No dimension is a multiple of 64, so that all of the padding shows.
ODD = replace(
    SMALL,
    vision=replace(SMALL.vision, hidden_size=24, num_attention_heads=2, ffn_hidden_size=52),
    text=replace(SMALL.text, hidden_size=40, kv_channels=10, ffn_hidden_size=52, vocab_size=515),
)
FROZEN = replace(ODD, freeze_vision=True)
DECODER_FROZEN = replace(ODD, freeze_decoder=True)

# layout: (placement, model, packed rows, keys of parallel, keys of recompute)
CASES = {
    "dp3": ("data", ODD, False, {"ddp_bucket_size": 1700}, {}),
    "dp2tp2pp2": ("all", ODD, False, {}, {"vision_chunk_views": 2}),
    "tp2pp2vpp2": ("data", ODD, False, {}, {"vision": "full", "decoder": "full"}),
    "dp2cp2tp2sp": ("tensor", ODD, True, {}, {"decoder": "selective"}),
    "cp4ag": ("data", ODD, False, {}, {"offload": True}),
    "pp2vpp2": ("all", FROZEN, False, {"use_distributed_optimizer": False}, {}),
    "tp2pp2cp2sp": ("data", DECODER_FROZEN, True, {}, {}),
}


def question_of(name: str, device: str = "H100") -> Question:
    """The planner's question about a small run in one of the layouts above."""
    placement, model, packed, parallel, recompute = CASES[name]
    named = parse_layout(name, placement, "cpu")
    config = RunConfig(
        model=model,
        parallel=replace(named.parallel, **parallel),
        recompute=RecomputeConfig(**recompute),
        data=DataConfig(seq_length=128, packing=PackingConfig(enabled=packed)),
        train=TrainConfig(global_batch_size=48, micro_batch_size=1 if packed else 2),
    )
    assert check_run(config, named.world_size) == []
    return Question(config, DEVICES[device], named.world_size, 0.5, 50 if packed else None)


def found_on(question: Question, rank: int) -> list[str]:
    """What is not as planned on a rank."""
    candidate = candidate_of(question.config, question.world_size)
    planned = plan_rank(question, candidate, rank)
    return list(differences(planned, dry_rank.build_rank(question, candidate, rank)))


@pytest.mark.parametrize("name", CASES)
def test_first_and_last_rank(name):
    question = question_of(name)
    assert [found_on(question, rank) for rank in (0, question.world_size - 1)] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["H100", "CPU"])
@pytest.mark.parametrize("name", CASES)
def test_every_rank(name, device):
    question = question_of(name, device)
    assert [found_on(question, rank) for rank in range(question.world_size)] == [[]] * question.world_size


def test_a_wrong_plan_is_found(monkeypatch):
    monkeypatch.setattr(state_bytes, "STEP_BYTES", 8)
    (found,) = found_on(question_of("dp3"), 1)
    assert found.startswith("optimizer: planned ")


def test_a_rank_built_otherwise_is_found(monkeypatch):
    """Sequence parallelism lost on the way to the build: twice as long hidden states."""

    def without(question, candidate):
        config = buildable(question, candidate)
        return replace(config, parallel=replace(config.parallel, sequence_parallel=False))

    buildable = dry_rank.buildable
    monkeypatch.setattr(dry_rank, "buildable", without)
    assert found_on(question_of("tp2pp2cp2sp"), 0) == [
        "results: planned ((32, 1, 40),), built ((64, 1, 40),)",
        "received: planned (((32, 1, 40), 2, 2),), built (((64, 1, 40), 2, 2),)",
        "sent: planned (((32, 1, 40), 2, 2),), built (((64, 1, 40), 2, 2),)",
    ]


def test_what_cannot_be_built_is_refused():
    question = question_of("dp3")
    quantised = replace(question.config, precision=PrecisionConfig(fp8="tensorwise"))
    with pytest.raises(ConfigError, match="for --rank use precision.fp8=none"):
        found_on(replace(question, config=quantised), 0)
    short = replace(question.config, data=DataConfig(seq_length=8))
    with pytest.raises(ConfigError, match="data.seq_length = 8: the plan's images"):
        found_on(replace(question, config=short), 0)


PIPELINE = ["parallel.pipeline_model_parallel_size=4", "recompute.vision=none"]


def test_the_command_on_the_large_model(capsys):
    """A rank of the last stage: 9 of 36 layers and the head."""
    assert main(["plan", EXAMPLE, "--gpus", "1024", "--rank", "1000", *PIPELINE]) == 0
    out = capsys.readouterr().out
    assert "TP4 CP1 DP64 PP4 SP, vision placement data: a step of 4 micro-batches" in out
    assert "rank 1000 (dp58 pp3 cp0 tp0): layers 27-35 (9) + head" in out
    assert out.count("4 x [1024, 1, 4096]") == 4
    assert out.endswith("All as planned on 1 of 1,024 ranks.\n")


def test_the_command_names_what_differs(capsys, monkeypatch):
    def wrong(*arguments):
        return replace(plan_rank(*arguments), gradient_bytes=5, buffers=1)

    monkeypatch.setattr(dry_run, "plan_rank", wrong)
    assert main(["plan", EXAMPLE, "--gpus", "1024", "--rank", "1000,1001", *PIPELINE]) == 1
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == "rank 1000: buffers: planned 1 elements, built 0 (-1)"
    assert lines[3].startswith("rank 1001: gradient: planned 5 bytes, built ")


@pytest.mark.parametrize("ranks", ["1024", "1,x", "sample:0", "-1", ""])
def test_ranks_that_are_not_there(ranks, capsys):
    assert main(["plan", EXAMPLE, "--gpus", "1024", f"--rank={ranks}"]) == 2
    assert f"--rank {ranks}: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_of_its_own(tmp_path):
    """With torch.compile on, as users have it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "0"}
    command = [
        sys.executable,
        "-m",
        "megatron_vl",
        "plan",
        EXAMPLE,
        "--gpus",
        "64",
        "--rank",
        "63",
        *PIPELINE,
    ]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("All as planned on 1 of 64 ranks.\n")


@pytest.mark.slow
@pytest.mark.parametrize(("length", "batch"), [(4096, 8192), (131072, 1024)])
def test_ranks_of_the_best_layout_of_1024(length, batch):
    overrides = [f"data.seq_length={length}", f"train.global_batch_size={batch}"]
    config = load_checked_run(EXAMPLE, overrides).config
    best = Planner(Question(config, DEVICES["H100"], 1024, 0.3)).answer(1).best[0].candidate
    question = Question(best.run(config), DEVICES["H100"], 1024, 0.3)
    for rank in chosen_ranks("sample:22", 1024):
        assert found_on(question, rank) == [], f"rank {rank}"
