"""A run that is killed again and again ends where one that was left alone ends, and loses no good checkpoint."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from megatron_vl.checkpoint.folder import checkpoints, half_written
from megatron_vl.checkpoint.stored import check_files
from tests.train.processes import Command, pretrain
from tests.train.tiny_run import losses, make_files, write_config

STEPS, KILLS, RANKS = 24, 10, 2
KEYS = ["train.global_batch_size=4", "checkpoint.save_interval=3"]

pytestmark = pytest.mark.slow


def start(folder: Path, config: Path) -> Command:
    return pretrain(folder, config, RANKS, *KEYS)


def good(folder: Path) -> set[str]:
    """Checkpoints whose files are what their manifests say."""
    return {path.name for path in checkpoints(folder) if not check_files(path)}


def comes_true(condition, run: Command, seconds: float = 120) -> bool:
    """Whether the condition came true while the run was alive; looked at 500 times a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and run.process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def test_killed_at_ten_moments(tmp_path):
    """Every second kill is while a save is being written, the others anywhere after the start of training."""
    data, rng = make_files(tmp_path), random.Random(7)
    whole = write_config(data, tmp_path / "whole", train_steps=STEPS)
    run = start(tmp_path, whole)
    assert run.wait(300) == 0, run.output
    config = write_config(data, tmp_path / "run", train_steps=STEPS)
    folder, metrics = tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.jsonl"
    inside = 0
    for number in range(KILLS):
        before = good(folder)
        run = start(tmp_path, config)
        if number % 2:
            there = {p.name for p in half_written(folder)}
            met = comes_true(lambda there=there: {p.name for p in half_written(folder)} - there, run)
            time.sleep(rng.random() * 0.02)
            inside += met
        else:
            size = metrics.stat().st_mtime_ns if metrics.exists() else 0
            comes_true(lambda size=size: metrics.exists() and metrics.stat().st_mtime_ns > size, run)
            time.sleep(rng.random() * 0.6)
        ranks = list(run.ranks.values()) if run.process.poll() is None else []
        if ranks:
            rng.choice(ranks).kill()
        code = run.wait(120)
        assert code in (0, 137), run.output
        if code:
            assert "was killed by SIGKILL" in run.stderr
        assert before <= good(folder), run.output
        assert not before or f"resumed from {folder}" in run.stdout, run.output
    assert inside >= 3, "no kill met a save"
    run = start(tmp_path, config)
    assert run.wait(300) == 0, run.output
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert list(got) == list(expected) == list(range(1, STEPS + 1))
    assert got == pytest.approx(expected, abs=1e-6)
    assert f"step_{STEPS:08d}" in good(folder)
