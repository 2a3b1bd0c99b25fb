"""Requests to stop: signals and the wall clock, and what they may interrupt. Free of torch.

SIGTERM and SIGUSR1 ask for a save at the next step boundary; SIGINT stays what it is in Python, an immediate end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import psutil

from megatron_vl.parallel.launch import STOP_SIGNALS, STOPPED

PATIENCE_SECONDS = 0.5  # a worker that is just handing over its data would complain of a broken connection
AGAIN_SECONDS = 1.0  # an interruption can be lost in a destructor, then comes the next

NOTHING_TO_SAVE = "before the first step was done: nothing to save; start the same command again to continue"

T = TypeVar("T")


class Interrupted(BaseException):
    """Ends a wait for data from within a signal handler. No ``except Exception`` may hold it up."""


class StopRequest:
    """Whether this rank has been asked to stop. The loop agrees on it with the other ranks.

    number: the first signal, 0 = none; SIGALRM stands for the wall clock. agreed: the same, after the ranks have
    agreed. Before ``defer()`` there is nothing to save and a request ends the process at once; afterwards it is only
    noted, except within ``wait_for``.
    """

    def __init__(self) -> None:
        self.number = 0
        self.minutes: float | None = None
        self.agreed = 0
        self._deferred = False
        self._waiting = False
        self._speaks = self._listening = False

    def listen(self, minutes: float | None, speaks: bool) -> None:
        """Install the handlers, in the main thread.

        minutes: ``train.exit_duration_minutes``, counted from the start of the process. speaks: this rank prints.
        """
        self.minutes, self._speaks, self._listening = minutes, speaks, True
        for number in (*STOP_SIGNALS, signal.SIGALRM):
            signal.signal(number, self._on_signal)
        if minutes is not None:
            age = time.time() - psutil.Process().create_time()
            signal.setitimer(signal.ITIMER_REAL, max(60 * minutes - age, 1e-3))

    def defer(self) -> None:
        """From now on there may be something to save."""
        self._deferred = True

    def wait_for(self, wait: Callable[[], T]) -> T | None:
        """``wait()``, or None when a request comes first; a request in the midst of it soon ends it."""
        try:
            try:
                self._waiting = True
                return None if self.number else wait()
            finally:
                self._done_waiting()
        except Interrupted:  # also one that comes when the wait is just over
            self._done_waiting()
            return None

    def _done_waiting(self) -> None:
        self._waiting = False
        if self.number:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def ignore(self) -> None:
        """From now on the process only has to end: Python's default action at its exit would be a kill."""
        if self._listening:
            for number in (*STOP_SIGNALS, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)

    def reason(self, number: int) -> str:
        """A signal for people. number: as agreed by all ranks; perhaps that of another rank."""
        if number != signal.SIGALRM:
            return signal.Signals(number).name
        return f"train.exit_duration_minutes = {self.minutes:g}"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        alarm_for_wait = bool(self.number) and number == signal.SIGALRM
        self.number = self.number or number
        if not self._deferred:
            if self._speaks:  # not by print: the main thread may be in the middle of one
                os.write(1, f"stopped on {self.reason(number)} {NOTHING_TO_SAVE}\n".encode())
            os._exit(STOPPED)
        if self._waiting and alarm_for_wait:
            raise Interrupted
        if self._waiting:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS, AGAIN_SECONDS)
