"""Requests to stop at awkward moments: the run saves, ends with 75, and goes on as if nothing had been.

One case is part of every test run; `slow` has the rest: each phase on 1, 2 and 4 ranks.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.train import on_ranks
from tests.train.processes import Command, beat, pretrain, wait_for_phase
from tests.train.tiny_run import COLOURS, losses, make_files, read_lines, write_config

SAVED = (
    r"^stopped on {why} at step {step}; saved {run}/checkpoints/step_{step:08d}; start the same command again"
)
LAYOUT = {
    1: [],
    2: ["parallel.pipeline_model_parallel_size=2"],
    4: ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
}
# Steps of a second, evaluations of several batches, and nothing saved on the way unless a test asks for it.
KEYS = ["train.global_batch_size=32", "train.train_steps=4", "train.eval_interval=2"]
END_SECONDS = 30.0
# One colour is one colour at any size: the views are equal, and so are the losses.
SMALL, LARGE = (336, 112), (12000, 4000)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = make_files(tmp_path_factory.mktemp("stop"), samples=96, heldout=128)
    for name, colour in COLOURS.items():
        Image.new("RGB", SMALL, colour).save(folder / f"wide_{name}.png")
    return folder


def paint(data: Path, size: tuple[int, int]) -> None:
    """Some wide pictures in this size; the large ones take a second each to decode."""
    for name, colour in list(COLOURS.items())[:2]:
        Image.new("RGB", size, colour).save(data / f"wide_{name}.png")


@pytest.fixture(scope="module")
def uninterrupted(world, data, tmp_path_factory) -> Callable[[int], dict[int, float]]:
    """Losses of a run that nobody stops, by the number of ranks."""
    found: dict[int, dict[int, float]] = {}

    def run(ranks: int) -> dict[int, float]:
        if ranks not in found:
            folder = tmp_path_factory.mktemp(f"reference{ranks}")
            config = write_config(data, folder / "run")
            keys = [*KEYS, *LAYOUT[ranks], "data.seq_length=96"]
            world.run(ranks, on_ranks.pretrain, load_with(config, ranks, keys))
            found[ranks] = losses(folder / "run")
        return found[ranks]

    return run


def load_with(config: Path, ranks: int, keys: list[str]):
    from megatron_vl.plan.checks import load_checked_run

    return load_checked_run(str(config), keys, None, ranks, to_train=True)


@pytest.fixture
def start(data, tmp_path) -> Iterator[Callable[..., Command]]:
    """Starts the run in tmp_path/run on so many ranks."""
    commands: list[Command] = []

    def run(ranks: int, *keys: str) -> Command:
        config = write_config(data, tmp_path / "run")
        command = pretrain(tmp_path, config, ranks, *KEYS, *LAYOUT[ranks], "data.seq_length=96", *keys)
        commands.append(command)
        return command

    yield run
    for command in commands:
        command.close()


def stops(command: Command, run: Path, why: str, begin: float) -> int:
    """The step that is saved; asserts what a stopped run owes."""
    assert command.wait(END_SECONDS) == 75, command.output
    assert time.monotonic() - begin < END_SECONDS
    (line,) = re.findall(rf"^stopped on {why} at step .*$", command.stdout, flags=re.M)
    step = int(re.search(r"at step (\d+)", line).group(1))
    assert re.match(SAVED.format(why=why, step=step, run=run), line), line
    assert "Traceback" not in command.stderr, command.stderr
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{step:08d}"
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.suffix == ".tmp") == []
    return step


def continues(command: Command, run: Path, step: int, expected: dict[int, float]) -> None:
    """The run that was started again ends as if it had not been stopped."""
    assert command.wait(240) == 0, command.output
    assert f"resumed from {run}/checkpoints/step_{step:08d}: step {step}," in command.stdout
    found = losses(run)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-6)
    evaluations = [r["step"] for r in read_lines(run / "metrics.jsonl") if "eval_loss" in r]
    assert evaluations == [2, 4], "an evaluation that was abandoned is made up for, none is repeated"


def test_a_signal_to_every_process_while_data_are_loaded(data, start, uninterrupted, tmp_path):
    """Slurm signals all processes of a job: launcher, ranks, and the loading workers, which must not mind."""
    run = tmp_path / "run"
    paint(data, LARGE)
    try:
        command = start(2, "data.num_workers=1", "train.eval_interval=0")
        wait_for_phase(command, run, "loading data", 2)
        everyone = psutil.Process(command.process.pid).children(recursive=True)
        begin = time.monotonic()
        os.killpg(command.process.pid, signal.SIGTERM)
        step = stops(command, run, "SIGTERM", begin)
    finally:
        paint(data, SMALL)
    gone, alive = psutil.wait_procs(everyone, timeout=10)
    assert len(gone) > 4 and alive == [], "loading workers are left"
    continues(start(2, "data.num_workers=1"), run, step, uninterrupted(2))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_during_loading(data, start, uninterrupted, tmp_path, ranks, workers):
    run = tmp_path / "run"
    paint(data, LARGE)
    try:
        command = start(ranks, f"data.num_workers={workers}")
        wait_for_phase(command, run, "loading data", 2)
        begin = time.monotonic()
        command.process.send_signal(signal.SIGTERM)
        step = stops(command, run, "SIGTERM", begin)
    finally:
        paint(data, SMALL)
    assert step < 4 and "eval" not in command.stdout.partition("stopped")[2]
    continues(start(ranks), run, step, uninterrupted(ranks))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("phase", "keys"), [
    ("training", []),
    ("saving", ["checkpoint.save_interval=2", "checkpoint.async_save=false"]),
    ("saving", ["checkpoint.save_interval=2"]),
    ("evaluating", []),
], ids=["forward", "save", "async_save", "evaluation"])  # fmt: skip
def test_during(start, uninterrupted, tmp_path, ranks, phase, keys):
    run = tmp_path / "run"
    command = start(ranks, *keys)
    wait_for_phase(command, run, phase, 2)
    begin = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    hit = beat(run, 0)
    step = stops(command, run, "SIGTERM", begin)
    if phase == "training":
        assert hit["phase"] == "training", "the signal came after the step"
        assert step == hit["step"], "the step was not finished"
    else:
        assert step == 2
    if phase == "evaluating":
        assert "eval at step 2 abandoned after " in command.stdout
    assert len(re.findall(r"^saved ", command.stdout, flags=re.M)) == 1, "saved twice, or not at all"
    continues(start(ranks, *keys), run, step, uninterrupted(ranks))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_signal_to_one_rank_stops_all(start, uninterrupted, tmp_path, ranks, number):
    run = tmp_path / "run"
    command = start(ranks)
    wait_for_phase(command, run, "training", 2)
    begin = time.monotonic()
    command.ranks[ranks - 1].send_signal(number)
    step = stops(command, run, number.name, begin)
    continues(start(ranks), run, step, uninterrupted(ranks))


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_stop_by_themselves(start, uninterrupted, tmp_path):
    """They would go on beside the ranks of the next start."""
    run = tmp_path / "run"
    command = start(2)
    wait_for_phase(command, run, "training", 2)
    ranks = list(command.ranks.values())
    command.process.kill()
    assert psutil.wait_procs(ranks, timeout=END_SECONDS)[1] == []
    assert "its launcher is gone; stopping" in command.stderr
    step = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    assert f"stopped on SIGTERM at step {step}; saved " in command.stdout
    continues(start(2), run, step, uninterrupted(2))


@pytest.mark.slow
def test_the_wall_clock_counts_from_the_start_of_the_process(start, tmp_path):
    run = tmp_path / "run"
    begin = time.monotonic()
    command = start(2, "train.train_steps=2000", "train.exit_duration_minutes=0.5")
    assert command.wait(60 + END_SECONDS) == 75, command.output
    assert 29 < time.monotonic() - begin < 30 + END_SECONDS
    assert re.search(
        r"^stopped on train.exit_duration_minutes = 0.5 at step \d+; saved ", command.stdout, flags=re.M
    )
    assert (run / "checkpoints" / "latest").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_the_first_step_there_is_nothing_to_save(start, tmp_path, number):
    run = tmp_path / "run"
    command = start(2)
    command.wait_for(lambda: bool(beat(run, 0)) and bool(beat(run, 1)), 60, pause=0.01)
    command.process.send_signal(number)
    assert command.wait(END_SECONDS) == 75, command.output
    assert f"stopped on {number.name} before the first step was done: nothing to save" in command.stdout
    assert not (run / "checkpoints").exists() and "Traceback" not in command.stderr
