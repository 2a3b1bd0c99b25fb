"""Lines about how far a long run is: samples, speed and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO


class Progress:
    """Prints at most one line every `every` seconds to `stream`, and one at the end.

    total: samples in all. done: samples finished by an earlier start, which say nothing about the speed.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        every: float = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.label, self.total, self.done, self.every = label, total, done, every
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._started = self._last = clock()
        self._resumed = done

    def add(self, samples: int) -> None:
        self.done += samples
        now = self._clock()
        if now - self._last >= self.every or self.done >= self.total:
            self._last = now
            print(self.line(now), file=self._stream, flush=True)

    def line(self, now: float) -> str:
        """E.g. `rules: 5,120 of 20,480 samples (25%), 640/s, 0:00:24 left`."""
        spent = max(now - self._started, 1e-9)
        speed = (self.done - self._resumed) / spent
        share = f"{self.label}: {self.done:,} of {self.total:,} samples ({100 * self.done // max(1, self.total)}%)"
        if speed <= 0:
            return share
        return f"{share}, {speed:,.0f}/s, {format_seconds((self.total - self.done) / speed)} left"


def format_seconds(seconds: float) -> str:
    """H:MM:SS."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
