"""A rank that hangs ends the run within the time-out, and is named with its place and what it was doing."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.train.processes import Command, beat, pretrain, wait_for_phase
from tests.train.tiny_run import LAYOUTS, make_files, write_config

TIMEOUT = 15
KEYS = [f"parallel.timeout_seconds={TIMEOUT}", "train.train_steps=5000"]
# A round of the heartbeat, the share that a collective gets, the launcher's grace, on a busy machine.
AFTER = 25.0


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(make_files(tmp_path), tmp_path / "run")


@pytest.fixture
def running(tmp_path) -> Iterator[list[Command]]:
    """Commands that are ended with the test."""
    commands: list[Command] = []
    yield commands
    for command in commands:
        command.close()


def ends(command: Command, begin: float) -> str:
    """What is printed by a run that a rank hangs, which must end in time and leave nothing."""
    everyone = psutil.Process(command.process.pid).children(recursive=True)
    assert command.wait(TIMEOUT + AFTER) == 124, command.output
    assert time.monotonic() - begin > TIMEOUT - 2, "that was no time-out"
    assert psutil.wait_procs(everyone, timeout=5)[1] == []
    return command.stderr


def test_a_rank_asleep_in_python(running, config, tmp_path):
    keys = [*KEYS, "--nproc", "2"]
    command = Command(tmp_path, "-m", "tests.train.asleep", "1", str(config), *keys)
    running.append(command)
    wait_for_phase(command, tmp_path / "run", "training", 3, rank=1)
    said = ends(command, time.monotonic())
    assert re.search(
        r"rank 1 \(dp1 pp0 cp0 tp0\) is not in a collective while training at step 3: for \d+ s in "
        r"train/asleep.py:\d+ train_step",
        said.partition("The run hangs because of:")[2],
    ), said
    assert "rank 0 (dp0 pp0 cp0 tp0) is not in a collective" not in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_a_stopped_rank(running, config, tmp_path, rank):
    """SIGSTOP: the process is there and silent. The others run into the time-out and say where."""
    command = pretrain(tmp_path, config, 4, *LAYOUTS["tp2pp2"][1], *KEYS)
    running.append(command)
    command.wait_for(lambda: "step 3/5000" in command.stdout, 240)
    begin = time.monotonic()
    command.ranks[rank].send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    last = beat(tmp_path / "run", rank)
    said = ends(command, begin)
    failed = re.findall(r"rank (\d) \(dp0 pp\d cp0 tp\d\) failed while [a-z ,]+ at step \d+: ", said)
    assert failed and str(rank) not in failed
    (line,) = said.partition("The run hangs because of:\n")[2].splitlines()
    assert re.match(
        rf"rank {rank} \(dp0 pp\d cp0 tp\d\) has given no sign of life for 1\d s \(stopped, or", line
    )
    assert f"while {last['phase']} at step {last['step']}" in line
