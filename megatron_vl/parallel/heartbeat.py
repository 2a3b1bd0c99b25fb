"""What each rank is doing, in ``RUN_DIR/ranks/rank_00003.json``, and the end of a rank that does nothing.

A thread beside the main one writes the file when the phase changes and every few seconds, so training never waits
for storage. The launcher, the other ranks and the operator read it (`beats.py`). The same thread ends the
process when the main thread makes no progress for longer than its phase may take.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.parallel.beats import INTERVAL, WRITES_PER_SECOND, Beat, beat_path, read_beats, suspects
from megatron_vl.parallel.launch import HUNG, launched
from megatron_vl.plan.layout import Layout

START_SPREAD_SECONDS = 60.0  # ranks are not started at the same moment
# a rank in a collective gets this much longer: the collective's own time-out says more
COLLECTIVE_SHARE, COLLECTIVE_SECONDS = 1.1, 5.0


def slow_seconds(parallel: ParallelConfig) -> float:
    """How long phases may last in which much is read, built or compiled: no collective waits for them meanwhile."""
    return max(6.0 * parallel.timeout_seconds, 1800.0)


@dataclass
class Phase:
    """What a rank is doing, for error messages and heartbeats.

    limit: seconds without progress after which the rank counts as hung; None = what the watch thinks is long.
    """

    name: str = "starting"
    step: int = 0
    limit: float | None = None
    ticks: int = 0
    changed: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def enter(self, name: str, step: int | None = None, limit: float | None = None) -> None:
        """Begin another phase."""
        self.name, self.limit = name, limit
        if step is not None:
            self.step = step
        self.ticks += 1
        self.changed.set()

    def tick(self) -> None:
        """Progress within the phase: a micro-batch, an evaluation batch."""
        self.ticks += 1

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}"


class Heartbeat:
    """The thread of one rank. Use as a context around everything that the rank does.

    folder: ``RUN_DIR/ranks``. slow: limit in s of phases that set none.
    """

    def __init__(self, folder: Path, layout: Layout, rank: int, phase: Phase, slow: float) -> None:
        self.folder, self.phase, self.slow = folder, phase, slow
        self.layout = layout
        self.rank, self.name, self.coords = rank, layout.describe(rank), str(layout.coords(rank))
        self.pause = layout.world_size / WRITES_PER_SECOND
        self.began = time.time()
        self.state = "running"
        self.idle = 0.0
        self._main, self._host = threading.main_thread().ident, socket.gethostname()
        self._parent = os.getppid() if launched() else 0
        self._seen: tuple[str, int, int] | None = None
        self._looked = time.monotonic()
        self._complained = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.state == "running":
            self.state = "ended" if kind is None or issubclass(kind, SystemExit) else "failed"
        self.close()

    def suspects(self, hung: bool) -> list[str]:
        """The ranks that the others wait for, or have lost, as far as the heartbeats show."""
        size = self.layout.world_size
        return suspects(self.layout, read_beats(self.folder, size, self.began - START_SPREAD_SECONDS), hung)

    def close(self) -> None:
        """Write the last state and end the thread; storage that does not answer is not waited for."""
        self._over.set()
        self.phase.changed.set()
        self._thread.join(INTERVAL)

    def _run(self) -> None:
        while not self._over.is_set():
            self._look()
            self._look_for_launcher()
            self._write()
            self._over.wait(self.pause)
            self.phase.changed.wait(INTERVAL)
            self.phase.changed.clear()
        self._write()

    def _look(self) -> None:
        """Count the seconds without progress; end the process when they are too many."""
        phase, now = self.phase, time.monotonic()
        seen = (phase.name, phase.step, phase.ticks)
        # a process that was suspended has not hung: at most two rounds are counted at once
        self.idle = self.idle + min(now - self._looked, 2 * INTERVAL) if seen == self._seen else 0.0
        self._seen, self._looked = seen, now
        limit = phase.limit if phase.limit is not None else self.slow
        if self.idle > limit and self.idle > self._allowed(limit):
            self._hung(limit)

    def _look_for_launcher(self) -> None:
        """Ask for a stop when the launcher was killed: the next start must not meet ranks that still write."""
        if self._parent and os.getppid() != self._parent:
            self._parent = 0
            print(f"{self.name}: its launcher is gone; stopping", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _allowed(self, limit: float) -> float:
        waiting = waits(self._frame())
        return limit * COLLECTIVE_SHARE + COLLECTIVE_SECONDS if waiting else limit

    def _hung(self, limit: float) -> None:
        """Say what is known and end the process: the main thread cannot."""
        self.state = "hung"
        frame = self._frame()
        self._write()
        lines = [
            f"{self.name} has made no progress for {self.idle:.0f} s while {self.phase} (limit {limit:.0f} s)",
            *self.suspects(hung=True),
            "Its main thread is here:",
            *(traceback.format_stack(frame) if frame else []),
        ]
        try:
            print(*lines, sep="\n", file=sys.stderr, flush=True)
        finally:
            os._exit(HUNG)

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main)

    def beat(self) -> Beat:
        """This moment of this rank."""
        frame, phase = None if self._over.is_set() else self._frame(), self.phase
        return Beat(
            rank=self.rank, coords=self.coords, phase=phase.name, step=phase.step, idle=round(self.idle, 1),
            frame=describe(frame), waiting=waits(frame), state=self.state, pid=os.getpid(), host=self._host,
            time=time.time(),
        )  # fmt: skip

    def _write(self) -> None:
        """Never an error: a disk that is full may not end a healthy run."""
        path = beat_path(self.folder, self.rank)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".tmp")
            aside.write_text(json.dumps(asdict(self.beat())))
            os.replace(aside, path)
        except OSError as error:
            if not self._complained:
                self._complained = True
                sentence = (
                    f"{self.name}: no heartbeat can be written to {self.folder} ({error}); training goes on"
                )
                print(sentence, file=sys.stderr, flush=True)


def describe(frame: FrameType | None) -> str:
    """``train/step.py:150 global_loss``."""
    if frame is None:
        return "no Python frame"
    parts = Path(frame.f_code.co_filename).parts
    return f"{'/'.join(parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"


def waits(frame: FrameType | None) -> bool:
    """Whether the innermost frames are those of a collective or of a pipeline exchange.

    On CUDA most collectives only start there, and the waiting shows elsewhere: False says little.
    """
    for _ in range(3):
        if frame is None:
            return False
        name = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}distributed{os.sep}" in name or name.endswith("p2p_communication.py"):
            return True
        frame = frame.f_back
    return False
