"""Processes that compare mathematics: time-outs hold, a kill loses nothing else, and nothing is left running."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.errors import ConfigError
from megatron_vl.rl.rewards.math_pool import ATTEMPTS, DIED, DIFFERENT, EQUAL, TIMEOUT, MathPool, MathSettings
from megatron_vl.rl.rewards.score import STOP, Services, score, score_all
from megatron_vl.rl.rewards.tally import TooManyVerifierErrors
from megatron_vl.rl.rewards.task import parse_task
from megatron_vl.rl.rewards.verdict import Ok, VerifierError

ENDLESS = "10^{10^9}"  # the guard of hostile answers does not know it, and sympy writes it out
SETTINGS = MathSettings(processes=2, timeout_seconds=1.5)


def gone(pid: int, within: float) -> bool:
    """Whether the process ends in time; one that only waits to be reaped has ended."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_hostile_answer_loses_no_other():
    """One endless comparison among eight: it alone is a time-out, and all its processes are gone afterwards."""
    with MathPool(SETTINGS) as pool, ThreadPoolExecutor(9) as threads:
        assert pool.compare("1", "1").status == EQUAL  # the first process is up
        started = time.monotonic()
        hostile = threads.submit(pool.compare, "5", ENDLESS)
        others = [threads.submit(pool.compare, "5", str(number)) for number in range(8)]
        assert [other.result().status for other in others] == [
            EQUAL if n == 5 else DIFFERENT for n in range(8)
        ]
        assert hostile.result().status == TIMEOUT
        taken = time.monotonic() - started
        pids = pool.pids()
        assert len(pids) <= SETTINGS.processes
    assert ATTEMPTS * SETTINGS.timeout_seconds <= taken < ATTEMPTS * SETTINGS.timeout_seconds + 30.0
    assert all(gone(pid, 5.0) for pid in pids) and pool.pids() == []
    assert pool.compare("1", "1").status == DIED


def test_a_time_out_masks_the_sample_and_the_rule_stops_the_run():
    task = parse_task({"kind": "math", "answer": "5"})
    texts = [rf"<think></think>\boxed{{{answer}}}" for answer in ("5", "6", ENDLESS)]
    with MathPool(MathSettings(processes=1, timeout_seconds=1.0)) as pool:
        services = Services(math=pool)
        verdicts, tally = score_all([task] * 3, texts, [STOP] * 3, services, max_error_share=0.5)
        assert verdicts[:2] == [Ok(1.0), Ok(0.0)] and isinstance(verdicts[2], VerifierError)
        assert tally.count("verifier_error", "math_timeout") == 1 and tally.count("ok") == 2
        assert tally.metrics()["rewards/score"] == 0.5  # of the two that were decided
        tally.max_error_share = 0.3
        with pytest.raises(TooManyVerifierErrors, match="1 of 3 verdicts of this iteration are missing"):
            tally.check()


def test_a_gold_answer_that_is_no_mathematics_is_named_as_such(math_pool):
    task = parse_task({"kind": "math", "answer": r"\foo{5}", "thinking": False})
    with pytest.raises(TooManyVerifierErrors) as error:
        score_all([task], [r"\boxed{5}"], [STOP], Services(math=math_pool), max_error_share=0.0)
    message = str(error.value)
    assert (
        "whose gold answer cannot be read (1 verdicts)" in message
        and "1 verifier errors (bad_gold 1)" in message
    )
    assert "judge" not in message


@pytest.mark.slow
def test_processes_are_replaced():
    with MathPool(MathSettings(processes=1, recycle_after=2, timeout_seconds=60.0)) as pool:
        pids = []
        for _ in range(4):
            assert pool.compare("2", "2").status == EQUAL
            pids.append(pool.pids())
        first, second = pids[0], pids[2]
        assert pids == [first, [], second, []] and first != second and gone(first[0], 5.0)
        pool.compare("2", "2")
        os.kill(pool.pids()[0], signal.SIGKILL)  # as the kernel does when memory is short
        assert pool.compare("2", "2").status == EQUAL


def test_closing_does_not_wait_for_a_comparison():
    pool = MathPool(MathSettings(processes=1, timeout_seconds=120.0))
    pool.compare("1", "1")
    results = []
    thread = threading.Thread(target=lambda: results.append(pool.compare("5", ENDLESS)))
    thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    pool.close()
    thread.join()
    assert time.monotonic() - started < 10.0
    assert [result.status for result in results] == [DIED] and pool.pids() == []
    pool.close()


@pytest.mark.parametrize("work", [pytest.param("idle", marks=pytest.mark.slow), "busy"])
def test_nothing_is_left_when_the_parent_is_killed(work):
    code = (
        "import sys, time, threading\n"
        "from megatron_vl.rl.rewards.math_pool import MathPool, MathSettings\n"
        "pool = MathPool(MathSettings(processes=1, timeout_seconds=2.0))\n"
        "pool.compare('1', '1')\n"
        "print(pool.pids()[0], flush=True)\n"
        f"pool.compare('5', '{ENDLESS}') if {work == 'busy'} else time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid, 15.0)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_a_worker_sees_no_keys(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key")
    with MathPool(MathSettings(processes=1)) as pool:
        pool.compare("1", "1")
        seen = Path(f"/proc/{pool.pids()[0]}/environ").read_bytes()
    assert b"secret-key" not in seen and b"PATH=" in seen


def test_a_process_that_cannot_be_replaced_masks():
    """After one has worked, a failing start is the machine's trouble of the moment, not a wrong configuration."""
    with MathPool(MathSettings(processes=1)) as pool:
        assert pool.compare("1", "1").status == EQUAL
        os.kill(pool.pids()[0], signal.SIGKILL)
        pool.settings = replace(pool.settings, memory_bytes=32 << 20)
        result = pool.compare("1", "1")
        assert result.status == DIED and "did not start" in result.detail


def test_what_cannot_start_says_so(monkeypatch):
    with (
        MathPool(MathSettings(memory_bytes=32 << 20)) as pool,
        pytest.raises(ConfigError, match="does not start .*memory limit 32 MiB"),
    ):
        pool.compare("1", "1")
    with pytest.raises(ConfigError, match="kind math and no processes"):
        score(parse_task({"kind": "math", "answer": "5"}), "", STOP)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="need the package math-verify"):
        MathPool()
