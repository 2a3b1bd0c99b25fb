"""``--nproc N``: start N local ranks of a command, watch them, pass on requests to stop, name the one that fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_vl.errors import ConfigError
from megatron_vl.parallel.beats import Seen, forget, last_seen, read_beats, suspects
from megatron_vl.plan.layout import Layout

STOPPED = 75  # EX_TEMPFAIL: a rank that was asked to stop, has saved and may be started again
HUNG = 124  # as timeout(1)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 15.0  # for the other ranks to end by themselves when one has ended
HUNG_GRACE_SECONDS = 5.0
SETTLE_SECONDS = 0.3  # between the first failure that is seen and the choice of the one to name


@dataclass(frozen=True)
class Environment:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int


def launched() -> bool:
    """Whether this process is already a rank of a launcher."""
    return "RANK" in os.environ or (
        "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    )


def read_environment() -> Environment:
    """Rank and world size from torchrun's or Slurm's variables; one rank when there are none.

    Raises:
        ConfigError: a launcher is there but its variables are incomplete.
    """
    env = os.environ
    if "RANK" in env:
        missing = [k for k in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in env]
        if missing:
            raise ConfigError(
                f"RANK={env['RANK']} is set but {', '.join(missing)} is not: start with torchrun or --nproc"
            )
        return Environment(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if launched():
        missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in env]
        if missing:
            raise ConfigError(
                f"under srun {' and '.join(missing)} must be exported, e.g. MASTER_ADDR=$(scontrol show hostnames "
                "$SLURM_JOB_NODELIST | head -1) MASTER_PORT=29500"
            )
        return Environment(
            int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
        )
    return Environment(0, 1, 0)


class Launcher:
    """The ranks of one command on this machine.

    folder: ``RUN_DIR/ranks`` with their heartbeats, None = they have none. stop_seconds: how long they may take to
    save and end after a request to stop.
    """

    def __init__(self, layout: Layout, folder: Path | None, stop_seconds: float) -> None:
        self.layout, self.folder, self.stop_seconds = layout, folder, stop_seconds
        self.processes: list[subprocess.Popen] = []
        self.began = time.time()
        self._requests: list[int] = []
        self._forwarded = 0
        self._deadline = float("inf")

    def start(self, command: Sequence[str]) -> None:
        """One process per rank, with its place in the environment."""
        if self.folder is not None:
            forget(self.folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.layout.world_size),
        }
        base = {"OMP_NUM_THREADS": "1", **os.environ, **place}
        for rank in range(self.layout.world_size):
            env = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(subprocess.Popen(command, env=env))

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: ``watch`` passes the request on, also to ranks that are just being started."""
        del frame
        self._requests.append(number)

    def watch(self) -> int:
        """Until all ranks have ended, or the first failure; the exit code of the run."""
        while True:
            self._pass_on()
            codes = self._codes()
            if any(code not in (None, 0, STOPPED) for code in codes) and STOPPED not in codes:
                time.sleep(SETTLE_SECONDS)
                return self._failure(self._codes())
            if None not in codes:
                return STOPPED if STOPPED in codes else 0
            if STOPPED in codes:
                # they stop together; one that does not has lost the others
                self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > self._deadline:
                self._say(
                    *(f"{self.layout.describe(r)} does not stop" for r, c in enumerate(codes) if c is None)
                )
                return STOPPED if STOPPED in codes else HUNG
            time.sleep(0.1)

    def _codes(self) -> list[int | None]:
        """Exit codes; a rank that a request killed before it could listen has stopped like the others."""
        codes = [process.poll() for process in self.processes]
        if self._forwarded:
            codes = [STOPPED if code is not None and -code in STOP_SIGNALS else code for code in codes]
        return codes

    def _pass_on(self) -> None:
        for number in self._requests[self._forwarded :]:
            self._forwarded += 1
            self._deadline = min(self._deadline, time.monotonic() + self.stop_seconds)
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(number)

    def _failure(self, codes: Sequence[int | None]) -> int:
        """Name the rank that failed first or, of a hang, the ranks that the others waited for."""
        beats = self._beats()
        rank = blamed({r: c for r, c in enumerate(codes) if c not in (None, 0)}, beats)
        code = codes[rank]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        line = f"{self.layout.describe(rank)} {how}{last_seen(beats.get(rank))}; stopping the other ranks"
        hung = suspects(self.layout, beats) if code == HUNG else []
        self._say(line, *(["The run hangs because of:", *hung] if hung else []))
        return code if code > 0 else 128 - code

    def _beats(self) -> dict[int, Seen]:
        if self.folder is None:
            return {}
        return read_beats(self.folder, self.layout.world_size, self.began)

    def _say(self, *lines: str) -> None:
        print(*lines, sep="\n", file=sys.stderr, flush=True)

    def interrupt(self) -> None:
        """Ctrl-C: the ranks end at once."""
        for process in self.processes:
            process.send_signal(signal.SIGINT)

    def end(self, seconds: float) -> None:
        """Wait for those that still run, then kill them: SIGKILL ends also what was stopped."""
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in self.processes) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def run_local(
    command: Sequence[str], layout: Layout, folder: Path | None = None, stop_seconds: float = 60.0
) -> int:
    """Run ``command`` once per rank of ``layout`` on this machine; the exit code of the run.

    A rank that fails is named, the others get GRACE_SECONDS to end by themselves (they print their own view of it)
    and are killed then. SIGTERM and SIGUSR1 go to all ranks, which save and end: code 75. SIGINT ends all: 130.
    folder, stop_seconds: see `Launcher`.
    """
    launcher = Launcher(layout, folder, stop_seconds)
    before = {number: signal.signal(number, launcher.note) for number in STOP_SIGNALS}
    code = 128 + signal.SIGINT
    try:
        launcher.start(command)
        code = launcher.watch()
    except KeyboardInterrupt:
        launcher.interrupt()
    finally:
        launcher.end(HUNG_GRACE_SECONDS if code == HUNG else GRACE_SECONDS)
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def blamed(codes: Mapping[int, int], beats: Mapping[int, Seen]) -> int:
    """Of the ranks that failed, the one that the others failed because of; the lowest of those that look alike.

    First one that was killed from outside (SIGABRT is how a library gives up), then a hang, then one that says that
    its own code failed, then those that say nothing, at last those that lost a peer.
    """

    def order(item: tuple[int, int]) -> tuple[int, int]:
        rank, code = item
        state = beats[rank].beat.state if rank in beats else "unknown"
        if code < 0 and code != -signal.SIGABRT:
            return 0, rank
        if code in (HUNG, STOPPED):
            return (1 if code == HUNG else 5), rank
        return {"failed": 2, "lost": 4}.get(state, 3), rank

    return min(codes.items(), key=order)[0]
