"""A run that is killed eight times, in every phase of an iteration, ends where one that was left alone ends."""

import random
import time

import pytest

from tests.rl.tiny_rl import (
    assert_same_curve,
    curve,
    prepare_files,
    reinforce,
    trained_samples,
    write_rl_config,
)
from tests.train.processes import beat

RANKS, ITERATIONS = 2, 6
PHASES = ("generating", "verifying", "learning", "saving", "generating", "learning", "reporting", "learning")

pytestmark = pytest.mark.slow


def comes(run, folder, phase: str, seconds: float = 180) -> bool:
    """Whether rank 0 was seen in the phase, beyond its first steps."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and run.process.poll() is None:
        seen = beat(folder, 0)
        if seen.get("phase") == phase and seen.get("state") == "running":
            return True
        time.sleep(0.001)
    return False


def test_killed_in_every_phase(tmp_path):
    data, rng = prepare_files(tmp_path), random.Random(5)
    keys = ["parallel.tensor_model_parallel_size=2", f"rl.iterations={ITERATIONS}"]
    whole = reinforce(tmp_path, write_rl_config(data, tmp_path / "whole"), RANKS, *keys)
    assert whole.wait(600) == 0, whole.output
    config, met = write_rl_config(data, tmp_path / "run"), 0
    for phase in PHASES:
        run = reinforce(tmp_path, config, RANKS, *keys)
        met += comes(run, tmp_path / "run", phase)
        time.sleep(rng.random() * 0.2)
        ranks = list(run.ranks.values()) if run.process.poll() is None else []
        if ranks:
            rng.choice(ranks).kill()
        code = run.wait(180)
        assert code in (0, 137), run.output
    assert met >= 6, "too few kills met their phase"
    run = reinforce(tmp_path, config, RANKS, *keys)
    assert run.wait(600) == 0, run.output
    assert list(curve(tmp_path / "whole")) == list(range(1, ITERATIONS + 1))
    assert_same_curve(tmp_path / "run", tmp_path / "whole")
    assert trained_samples(tmp_path / "run") == trained_samples(tmp_path / "whole")
