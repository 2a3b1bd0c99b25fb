"""`python -m megatron_vl pretrain` as a user runs it: its folder, its automatic resume, a killed rank."""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.train.processes import Command, pretrain
from tests.train.tiny_run import LAYOUTS, TOKENS_PER_STEP, load, losses, make_files, read_lines, write_config

# Starting four ranks takes 10 s of two quiet cores.
START_SECONDS = 240.0
FIRST = ["train.train_steps=4", "checkpoint.save_interval=3", "data.num_workers=1"]
RECORD = {
    "step", "loss", "grad_norm", "lr", "tokens", "text_tokens", "loss_tokens", "step_seconds",
    "data_wait_seconds", "tokens_per_second_per_gpu", "model_tflops", "mfu", "tower_share",
    "rows_filled", "vision_balance", "work_balance", "images",
    "crops", "memory_bytes",
    "bad_samples", "skipped_steps", "eta_seconds", "views_of_a_replica_min", "views_of_a_replica_max",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    return write_config(make_files(folder), folder / "run", eval_interval=2)


@pytest.fixture(scope="module")
def first(config, tmp_path_factory) -> Command:
    """Four steps on four ranks, an evaluation after two, a checkpoint after three and at the end."""
    command = pretrain(tmp_path_factory.mktemp("first"), config, 4, *LAYOUTS["tp2pp2"][1], *FIRST)
    try:
        assert command.wait(START_SECONDS) == 0, command.output
    finally:
        command.close()
    return command


@pytest.fixture
def running(tmp_path) -> Iterator[list[Command]]:
    """Commands that are ended with the test."""
    commands: list[Command] = []
    yield commands
    for command in commands:
        command.close()


def test_the_console_of_a_run(first, config):
    text = first.stdout
    assert re.search(r"total +[\d,]{6,}", text) and "Layout of 4 ranks: TP2 CP1 DP1 PP2" in text
    assert "layer backend torch, attention scaled_dot_product_attention" in text
    steps = re.findall(r"^step (\d)/4 \| loss \d.*$", text, flags=re.M)
    assert steps == ["1", "2", "3", "4"]
    assert re.findall(r"^eval at step (\d) \| loss \d+\.\d{4} over \d+ tokens$", text, flags=re.M) == [
        "2",
        "4",
    ]
    run = config.with_suffix("")
    saved = [f"saved {run}/checkpoints/step_{step:08d} (step {step}, " for step in (3, 4)]
    assert all(line in text for line in saved)
    assert text.rstrip().endswith(f"done: 4 steps, {4 * TOKENS_PER_STEP:,} tokens; everything is in {run}")
    assert "Traceback" not in first.stderr and "Warning" not in first.stderr, first.stderr


def test_the_folder_of_a_run(first, config):
    run = config.with_suffix("")
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "origins.json", "metrics.jsonl", "checkpoints", "ranks",
    }  # fmt: skip
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000004"
    for step in (3, 4):
        files = {p.name for p in (run / "checkpoints" / f"step_{step:08d}").iterdir()}
        assert files >= {"manifest.json", "state.json", "config.yaml", ".metadata"}
    records = read_lines(run / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [set(r) for r in steps] == [RECORD] * 4 and [r["step"] for r in steps] == [1, 2, 3, 4]
    assert [r["tokens"] for r in steps] == [TOKENS_PER_STEP * n for n in (1, 2, 3, 4)]
    assert [(r["step"], set(r)) for r in records if r not in steps] == [
        (step, {"step", "eval_loss", "eval_tokens"}) for step in (2, 4)
    ]
    assert steps[0]["loss"] == pytest.approx(6.24, abs=0.1) and steps[3]["loss"] < steps[0]["loss"]
    assert all(r["images"] > 0 and r["crops"] > 0 and r["mfu"] > 0 for r in steps)
    # The resolved config starts the same run, with what `auto` came to.
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["parallel"]["pipeline_model_parallel_size"] == 2 and resolved["train"]["train_steps"] == 4
    chosen = ["parallel.layer_backend=torch", "precision.params=fp32", "parallel.fused_kernels=never"]
    chosen += ["parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false"]
    assert load(run / "config.yaml", "tp2pp2").config == load(config, "tp2pp2", *FIRST, *chosen).config
    origins = json.loads((run / "origins.json").read_text())
    assert (
        origins["train.train_steps"] == "command line"
        and origins["model.text.num_layers"] == "preset step3_vl_tiny"
    )


def test_a_run_resumes_by_itself_and_a_killed_rank_ends_it(first, config, running, tmp_path):
    run = config.with_suffix("")
    before = losses(run)
    command = pretrain(tmp_path, config, 4, *LAYOUTS["tp2pp2"][1], "train.train_steps=5000")
    running.append(command)
    command.wait_for(lambda: "step 7/5000" in command.stdout, START_SECONDS)
    ranks = command.ranks
    assert sorted(ranks) == [0, 1, 2, 3]
    killed = time.monotonic()
    ranks[2].send_signal(signal.SIGKILL)
    assert command.wait(60) == 137
    assert time.monotonic() - killed < 40, "the time-out is 120 s, the grace of the launcher 15 s"
    assert re.search(
        r"^rank 2 \(dp0 pp1 cp0 tp0\) was killed by SIGKILL while [a-z ,]+ at step (\d+); stopping the other ranks$",
        command.stderr,
        flags=re.M,
    )
    # Those that noticed say what they were doing.
    assert re.search(
        r"rank [013] \(dp0 pp[01] cp0 tp[01]\) failed while [a-z ,]+ at step \d+: ",
        command.stderr,
    )
    assert all(
        not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in ranks.values()
    )
    assert (
        f"resumed from {run}/checkpoints/step_00000004: step 4, {4 * TOKENS_PER_STEP:,} tokens"
        in command.stdout
    )
    after = losses(run)
    assert {step: after[step] for step in before} == before
    assert list(after) == list(range(1, len(after) + 1)) and len(after) >= 7
