"""`--nproc N`: which rank is named when several end at once, and the ranks of a stopped launcher."""

import signal
import sys
import time

import psutil
import pytest

from megatron_vl.parallel.launch import _watch, run_local
from megatron_vl.plan.layout import Layout
from tests.train.processes import Command

LAUNCHER = """
import sys
from megatron_vl.parallel.launch import run_local
from megatron_vl.plan.layout import Layout
sleep = "import time; print('up', flush=True); time.sleep(600)"
sys.exit(run_local([sys.executable, "-c", sleep], Layout(dp=2)))
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
    assert _watch([Ended(code) for code in codes], Layout(tp=2, pp=2)) == exit_code
    assert capsys.readouterr().err == f"{named}; stopping the other ranks\n"


def test_ranks_get_their_place_and_a_good_end_is_0():
    check = (
        "import os; assert os.environ['RANK'] == os.environ['LOCAL_RANK'] and os.environ['WORLD_SIZE'] == '2'"
    )
    assert run_local([sys.executable, "-c", check], Layout(dp=2)) == 0
    assert (
        run_local([sys.executable, "-c", "import os; exit(3 * int(os.environ['RANK']))"], Layout(dp=2)) == 3
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_takes_its_ranks_along(tmp_path, number):
    """`timeout`, a batch system or Ctrl-C reaches the launcher only; its ranks must not train on alone."""
    command = Command(tmp_path, "-c", LAUNCHER)
    try:
        command.wait_for(lambda: command.stdout.count("up") == 2, 60)
        ranks = psutil.Process(command.process.pid).children()
        assert len(ranks) == 2
        begin = time.monotonic()
        command.process.send_signal(number)
        assert command.wait(30) == 130
        assert time.monotonic() - begin < 10
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    finally:
        command.close()
