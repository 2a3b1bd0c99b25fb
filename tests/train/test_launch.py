"""`--nproc N`: which rank is named when several end at once, and the ranks of a stopped launcher."""

import signal
import sys
import time

import psutil
import pytest

from megatron_vl.parallel import launch
from megatron_vl.parallel.beats import Beat, Seen
from megatron_vl.parallel.launch import Launcher, blamed, run_local
from megatron_vl.plan.layout import Layout
from tests.train.processes import Command

LAUNCHER = """
import sys
from megatron_vl.parallel.launch import run_local
from megatron_vl.plan.layout import Layout
sleep = "import time; print('up', flush=True); time.sleep(600)"
sys.exit(run_local([sys.executable, "-c", sleep], Layout(dp=2)))
"""


# Ranks that save for a second when they are asked to, and say so; rank 1 is a mule under "stubborn".
RANKS = """
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0 if sys.argv[1] == "stubborn" and os.environ["RANK"] == "1" else 1)
    if sys.argv[1] != "stubborn" or os.environ["RANK"] == "0":
        os.write(1, ("saved " + signal.Signals(number).name + chr(10)).encode())  # in one piece: both write
        os._exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
print("up", flush=True)
while True:
    time.sleep(0.1)
"""
FORWARDER = f"""
import sys
from megatron_vl.parallel import launch
from megatron_vl.plan.layout import Layout
launch.GRACE_SECONDS = 2.0
sys.exit(launch.run_local([sys.executable, "-c", {RANKS!r}, sys.argv[1]], Layout(dp=2), None, 20.0))
"""


class Ended:
    """Looks like a process that has ended, or still runs with None."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


@pytest.mark.parametrize(
    ("codes", "exit_code", "named"),
    [
        ([1, 1, -signal.SIGKILL, 1], 137, "rank 2 (dp0 pp1 cp0 tp0) was killed by SIGKILL"),
        ([-signal.SIGABRT, None, 3, None], 134, "rank 0 (dp0 pp0 cp0 tp0) was killed by SIGABRT"),
        (
            [None, -signal.SIGABRT, None, -signal.SIGSEGV],
            139,
            "rank 3 (dp0 pp1 cp0 tp1) was killed by SIGSEGV",
        ),
        ([None, 2, None, 1], 2, "rank 1 (dp0 pp0 cp0 tp1) ended with exit code 2"),
    ],
)
def test_the_rank_that_was_killed_is_named_before_those_that_failed_because_of_it(
    capsys, codes, exit_code, named
):
    launcher = Launcher(Layout(tp=2, pp=2), None, 60.0)
    launcher.processes = [Ended(code) for code in codes]
    assert launcher.watch() == exit_code
    assert capsys.readouterr().err == f"{named}; stopping the other ranks\n"


def test_a_rank_whose_own_code_failed_is_named_before_those_that_lost_it():
    def seen(rank: int, state: str) -> Seen:
        return Seen(Beat(rank, "", "training", 7, 0.0, "", False, state, 1, "host", 0.0), 0.0)

    beats = {0: seen(0, "lost"), 1: seen(1, "failed"), 2: seen(2, "failed")}
    assert blamed({0: 1, 1: 1, 2: 1}, beats) == 1
    assert blamed({0: 1, 1: 1, 2: 1}, {}) == 0
    assert blamed({0: 1, 1: 1, 3: 124}, beats) == 3
    assert blamed({0: 1, 1: 1, 3: 124, 5: -9}, beats) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_is_passed_on_and_waited_for(tmp_path, number):
    command = Command(tmp_path, "-c", FORWARDER, "obedient")
    try:
        command.wait_for(lambda: command.stdout.count("up") == 2, 60)
        command.process.send_signal(number)
        assert command.wait(30) == 75
        assert command.stdout.count(f"saved {number.name}") == 2
        assert command.stderr == ""
    finally:
        command.close()


def test_a_rank_that_does_not_stop_with_the_others_is_ended(tmp_path):
    command = Command(tmp_path, "-c", FORWARDER, "stubborn")
    try:
        command.wait_for(lambda: command.stdout.count("up") == 2, 60)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(30) == 75
        assert command.stderr == "rank 1 (dp1 pp0 cp0 tp0) does not stop\n"
    finally:
        command.close()


def test_ranks_that_a_request_kills_before_they_can_listen_have_stopped(tmp_path):
    """SIGTERM ends them by default; without a request the same end is a failure."""
    command = Command(tmp_path, "-c", LAUNCHER)
    try:
        command.wait_for(lambda: command.stdout.count("up") == 2, 60)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(30) == 75 and command.stderr == ""
    finally:
        command.close()
    launcher = Launcher(Layout(dp=2), None, 60.0)
    launcher.processes = [Ended(-signal.SIGTERM), Ended(None)]
    assert launcher.watch() == 128 + signal.SIGTERM


def test_one_rank_that_has_stopped_stops_the_run(monkeypatch, capsys):
    """The request reached one rank only, before the others could be told; they fail because of it, or stay."""
    launcher = Launcher(Layout(dp=3), None, 60.0)
    launcher.processes = [Ended(75), Ended(1), Ended(75)]
    assert launcher.watch() == 75
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    launcher.processes = [Ended(75), Ended(1), Ended(None)]
    assert launcher.watch() == 75
    assert "rank 2 (dp2 pp0 cp0 tp0) does not stop" in capsys.readouterr().err


def test_ranks_get_their_place_and_a_good_end_is_0():
    check = (
        "import os; assert os.environ['RANK'] == os.environ['LOCAL_RANK'] and os.environ['WORLD_SIZE'] == '2'"
    )
    assert run_local([sys.executable, "-c", check], Layout(dp=2)) == 0
    assert (
        run_local([sys.executable, "-c", "import os; exit(3 * int(os.environ['RANK']))"], Layout(dp=2)) == 3
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_launcher_takes_its_ranks_along(tmp_path, number, code):
    """`timeout`, a batch system or Ctrl-C reaches the launcher only; its ranks must not train on alone."""
    command = Command(tmp_path, "-c", LAUNCHER)
    try:
        command.wait_for(lambda: command.stdout.count("up") == 2, 60)
        ranks = psutil.Process(command.process.pid).children()
        assert len(ranks) == 2
        begin = time.monotonic()
        command.process.send_signal(number)
        assert command.wait(30) == code
        assert time.monotonic() - begin < 10
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    finally:
        command.close()
