"""Requests to stop, one process at a time: what a signal does when."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.loader import Loader, MicroBatches, Place, train_loader
from megatron_vl.data.order import SampleOrder
from megatron_vl.data.rows import RowBuilder
from megatron_vl.errors import DataError
from megatron_vl.train.faults import StopRequest
from tests.data.tiny import MODEL, chat, make_data, write_jsonl

ROOT = Path(__file__).parents[2]
BEGIN = """
import os, signal, sys, time
from megatron_vl.errors import DataError
from megatron_vl.train.faults import StopRequest
stop = StopRequest()
stop.listen(None, speaks=True)
def send_after(seconds, number=signal.SIGTERM):
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(os.getppid(), number)
        os._exit(0)
"""


def run(program: str, seconds: float = 30.0) -> tuple[int, str, float]:
    """(exit code, output, s of the program behind BEGIN) of a process of its own."""
    program = (
        f"{BEGIN}\nbegan = time.monotonic()\n{program}\nprint('took', time.monotonic() - began, flush=True)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
    out, _, took = ended.stdout.partition("took")
    return ended.returncode, out + ended.stderr, float(took or "nan")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_there_is_anything_to_save_a_request_ends_the_process(number):
    code, said, _ = run(f"send_after(0.2, {int(number)})\ntime.sleep(60)")
    assert code == 75
    assert said == (
        f"stopped on {number.name} before the first step was done: nothing to save; start the same command again to "
        "continue\n"
    )


def test_afterwards_it_is_noted_and_the_first_one_counts():
    program = """
stop.defer()
os.kill(os.getpid(), signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGTERM)
print(stop.number == signal.SIGUSR1, stop.reason(stop.number), stop.wait_for(lambda: 5))
"""
    assert run(program)[:2] == (0, "True SIGUSR1 None\n")


def test_it_ends_a_wait_for_data():
    program = """
stop.defer()
send_after(0.3)
def wait():
    try:
        time.sleep(60)
    except Exception:
        print("held up")
print(stop.wait_for(wait), stop.number == signal.SIGTERM)
time.sleep(2)  # nothing comes after the wait
"""
    code, said, took = run(program)
    assert (code, said) == (0, "None True\n") and took < 8


def test_data_that_come_at_once_are_taken():
    """Otherwise the worker that hands them over would print an error."""
    program = """
stop.defer()
def wait():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    return "data"
print(stop.wait_for(wait), stop.number == signal.SIGTERM)
time.sleep(2)
"""
    assert run(program)[:2] == (0, "data True\n")


def test_an_interruption_that_a_destructor_swallows_is_repeated():
    program = """
class Slow:
    def __del__(self):
        time.sleep(1.2)
stop.defer()
def wait():
    slow = Slow()
    os.kill(os.getpid(), signal.SIGTERM)
    del slow
    time.sleep(60)
print(stop.wait_for(wait))
"""
    code, said, took = run(program)
    assert code == 0 and said.startswith("None\n") and "Exception ignored in: <function Slow.__del__" in said
    assert took < 10


def test_the_wall_clock_counts_from_the_start_of_the_process():
    program = """
time.sleep(1)
stop.listen(2 / 60, speaks=True)  # 2 s after the start of Python
stop.defer()
print(stop.wait_for(lambda: time.sleep(60)), stop.reason(stop.number))
"""
    code, said, took = run(program)
    assert (code, said) == (0, f"None train.exit_duration_minutes = {2 / 60:g}\n") and took < 6


def test_while_leaving_nothing_kills_the_process():
    program = """
stop.listen(0.04, speaks=True)
stop.defer()
stop.ignore()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(3)
"""
    assert run(program)[0] == 0


def test_one_that_does_not_listen_never_stops():
    stop = StopRequest()
    stop.defer()
    stop.ignore()
    assert stop.wait_for(lambda: 5) == 5 and stop.number == 0


@pytest.fixture
def data(tmp_path):
    records = [chat(f"What colour? {n}", "red", "small.png", id=f"s{n}") for n in range(6)]
    return replace(make_data(tmp_path), train=[write_jsonl(tmp_path / "train.jsonl", records)], num_workers=2)


def loading_processes(loader: Loader) -> list[psutil.Process]:
    return [psutil.Process(worker.pid) for worker in loader._workers]


def test_loading_workers_do_not_mind_the_signals_of_a_batch_system(data):
    loader = train_loader(data, MODEL, Place(), 1, 4)
    loader.next_step()
    workers = loading_processes(loader)
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        worker.send_signal(signal.SIGUSR1)
    for _ in range(8):
        loader.next_step()
    assert all(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set(), "this process must hear them again"
    loader.close()
    assert psutil.wait_procs(workers, timeout=5)[1] == []


class SlowBuilder(RowBuilder):
    """Takes a minute for a row."""

    def build(self, raw):
        time.sleep(60)
        return super().build(raw)


def test_closing_ends_workers_in_the_middle_of_a_sample(data):
    source = JsonlSource(data.train)
    slow = MicroBatches(source, SampleOrder(len(source), 1), SlowBuilder(data, MODEL), Place(), 1, 2)
    loader = Loader(slow, timeout_seconds=10)
    with pytest.raises(DataError, match="timed out after 10 seconds"):
        loader.next_step()
    workers = loading_processes(loader)
    begin = time.monotonic()
    loader.close()
    assert len(workers) == 2 and time.monotonic() - begin < 3
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_workers_end_with_their_parent(data, tmp_path):
    """kill -9 of a rank leaves nobody behind."""
    program = f"""
import time
from megatron_vl.config.mixture import PackingConfig
from megatron_vl.config.schema import DataConfig
from tests.train.test_faults import MODEL, Place, loading_processes, train_loader
if __name__ == "__main__":
    loader = train_loader({data!r}, MODEL, Place(), 1, 4)
    loader.next_step()
    print(*[p.pid for p in loading_processes(loader)], flush=True)
    time.sleep(600)
"""
    script = tmp_path / "parent.py"
    script.write_text(program)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=20)[1] == []
