"""What a conversion says of itself: progress with the time left, peak memory, the table at its end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

GIB = 2**30
QUIET_SECONDS, LINE_SECONDS, SAMPLE_SECONDS = 2.0, 1.0, 0.05


@dataclass(frozen=True)
class Figures:
    """What was done. nbytes: of the values written (or compared). peak: anonymous and shared memory, bytes."""

    tensors: int
    parameters: int
    nbytes: int
    seconds: float
    peak: int

    @property
    def rate(self) -> float:
        """MB/s, in units of 10^6 bytes."""
        return self.nbytes / 1e6 / max(self.seconds, 1e-9)


def held_bytes(process: str = "self") -> int:
    """Anonymous and shared memory of a process in bytes; pages of mapped files do not count. 0: it has ended.

    Linux only (/proc).
    """
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return sum(int(found.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


class Meter:
    """Counts bytes from any thread and prints a line a second on work that lasts more than two seconds.

    A terminal shows one line that changes; a file or pipe gets plain lines. Use as a context.
    """

    def __init__(self, what: str, total: int, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.what, self.total, self.done, self.peak = what, total, 0, held_bytes()
        self._stream = stream or sys.stderr
        self._tty, self._quiet, self._printed = self._stream.isatty(), quiet, False
        self._lock, self._end = threading.Lock(), threading.Event()
        self._started = time.monotonic()
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def add(self, nbytes: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self.done += nbytes

    def say(self, text: str) -> None:
        """A line of its own, between those of the progress."""
        with self._lock:
            self._stream.write(("\r\033[K" if self._tty and self._printed else "") + text + "\n")
            self._stream.flush()

    def _watch(self) -> None:
        next_line = self._started + QUIET_SECONDS
        while not self._end.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, held_bytes())
            now = time.monotonic()
            if now >= next_line and not self._quiet:
                next_line = now + LINE_SECONDS
                self._print(now)

    def _print(self, now: float) -> None:
        with self._lock:
            line = progress_line(self.what, self.done, self.total, now - self._started)
            self._stream.write(f"\r\033[K{line}" if self._tty else line + "\n")
            self._stream.flush()
            self._printed = True

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._started
        self.peak = max(self.peak, held_bytes())
        if self._tty and self._printed:
            self._stream.write("\r\033[K")
            self._stream.flush()


def progress_line(what: str, done: int, total: int, seconds: float) -> str:
    """``import  3.20 of 20.34 GB  15 %  412 MB/s  42 s left``."""
    rate = done / max(seconds, 1e-9)
    left = f"{(total - done) / rate:.0f} s left" if done else "time left unknown"
    share = 100 * done / max(total, 1)
    return f"{what}  {done / 1e9:.2f} of {total / 1e9:.2f} GB  {share:.0f} %  {rate / 1e6:.0f} MB/s  {left}"


def summary(figures: Figures) -> str:
    """The table at the end of a conversion."""
    head = ("tensors", "parameters", "GB", "seconds", "peak GiB", "MB/s")
    row = (
        f"{figures.tensors:,}",
        f"{figures.parameters:,}",
        f"{figures.nbytes / 1e9:.3f}",
        f"{figures.seconds:.1f}",
        f"{figures.peak / GIB:.2f}",
        f"{figures.rate:.0f}",
    )
    return table([head, row])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, right-aligned but for the first, a line under the head."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    return "\n".join([line(rows[0]), "-" * len(line(rows[0])), *(line(row) for row in rows[1:])])
