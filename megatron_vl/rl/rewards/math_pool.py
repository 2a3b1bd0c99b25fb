"""Processes that compare mathematical answers, each killed when it takes too long and replaced.

`math-verify` uses `signal.alarm`, so it only works on a main thread; a hostile answer keeps sympy busy for minutes
inside C code, where an alarm that raises is not heard; and sympy's caches grow. A process of its own that can be killed
settles all three. One process works on one pair, so that a kill loses nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.errors import ConfigError

EQUAL, DIFFERENT, NO_ANSWER, NO_GOLD = "equal", "different", "no_answer", "no_gold"
TIMEOUT, DIED, ERROR = "timeout", "died", "error"
ATTEMPTS = 2  # of a comparison that timed out or whose process died, the second in a new process

_WORKER = Path(__file__).with_name("math_worker.py")
# All that a worker sees of the environment: no keys or tokens.
_ENVIRONMENT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LANG",
    "LC_ALL",
    "TMPDIR",
)


@dataclass(frozen=True)
class Comparison:
    """status: EQUAL, DIFFERENT, NO_ANSWER or NO_GOLD (which text is no mathematics), or one of the failures TIMEOUT,
    DIED, ERROR. detail: for the log."""

    status: str
    detail: str = ""


@dataclass(frozen=True)
class MathSettings:
    """processes: how many pairs are compared at once. timeout_seconds: of one attempt, without the start of a process.
    recycle_after: comparisons after which a process is replaced. memory_bytes: address space of each.
    start_seconds: within which a process must have imported math-verify."""

    processes: int = 4
    timeout_seconds: float = 10.0
    recycle_after: int = 500
    memory_bytes: int = 2 << 30
    start_seconds: float = 120.0


class _NoProcess(Exception):
    """There is no process to compare with, for now or because the pool is closed."""


class MathPool:
    """`compare` may be called from any number of threads; beyond `processes` they wait. A context manager."""

    def __init__(self, settings: MathSettings = MathSettings()):  # noqa: B008
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "tasks of kind math need the package math-verify; pip install 'megatron-vl[rl]', or leave them out"
            )
        self.settings = settings
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(settings.processes):
            self._slots.put(None)
        self._live: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = self._worked = False

    def __enter__(self) -> MathPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def compare(self, gold: str, answer: str) -> Comparison:
        """Whether two LaTeX texts are the same mathematics.

        Takes at most ATTEMPTS x timeout_seconds, besides waiting for a process and its start.
        """
        worker = self._slots.get()
        try:
            result = Comparison(DIED)
            for _ in range(ATTEMPTS):
                try:
                    worker = worker or self._start()
                except _NoProcess as error:
                    result = Comparison(DIED, str(error))
                    continue
                result = worker.compare(gold, answer, self.settings.timeout_seconds)
                failed = result.status in (TIMEOUT, DIED)
                if failed or worker.served >= self.settings.recycle_after:
                    self._end(worker)
                    worker = None
                if not failed:
                    break
            return result
        finally:
            self._slots.put(worker)

    def close(self) -> None:
        """Ends every process and waits for the threads that use them; their comparisons return DIED."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for worker in self._live:
                worker.process.kill()
        for _ in range(self.settings.processes):
            if worker := self._slots.get():
                self._end(worker)
        self._slots.put(None)  # one after the other, late callers find the pool closed

    def pids(self) -> list[int]:
        """Processes that are running."""
        with self._lock:
            return [worker.process.pid for worker in self._live]

    def _start(self) -> _Worker:
        """A process that is ready. Raises _NoProcess; ConfigError if none ever was, which waiting does not cure."""
        with self._lock:
            if self._closed:
                raise _NoProcess("the pool is closed")
            worker = _Worker(self.settings)
            self._live.add(worker)
        started = worker.wait_until_ready(self.settings.start_seconds)
        if started.status == "ready":
            self._worked = True
            return worker
        self._end(worker)
        if self._worked or self._closed:
            raise _NoProcess(f"a process did not start: {started.status} {started.detail}")
        raise ConfigError(
            f"a process for math-verify does not start ({started.status} {started.detail}, memory limit "
            f"{self.settings.memory_bytes >> 20} MiB); try {sys.executable} -c 'import math_verify'"
        )

    def _end(self, worker: _Worker) -> None:
        worker.kill()
        with self._lock:
            self._live.discard(worker)


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(self, settings: MathSettings):
        # The alarm is for the case that this process dies; in all others the time-out comes first.
        alarm = settings.timeout_seconds + 2.0
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(os.getpid()), str(settings.memory_bytes), str(alarm)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run, which then closes the pool
        )
        self.served = 0

    def wait_until_ready(self, seconds: float) -> Comparison:
        return self._answer(time.monotonic() + seconds)

    def compare(self, gold: str, answer: str, seconds: float) -> Comparison:
        self.served += 1
        request = json.dumps({"gold": gold, "answer": answer}).encode() + b"\n"
        try:
            os.write(self.process.stdin.fileno(), request)  # a few KiB: fits the pipe of an idle process
        except OSError as error:
            return Comparison(DIED, str(error))
        return self._answer(time.monotonic() + seconds)

    def _answer(self, deadline: float) -> Comparison:
        received, source = b"", self.process.stdout.fileno()
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([source], [], [], left)[0]:
                return Comparison(TIMEOUT)
            data = os.read(source, 65536)
            if not data:
                return Comparison(DIED, f"exit code {self.process.wait()}")
            received += data
        return Comparison(**json.loads(received))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
