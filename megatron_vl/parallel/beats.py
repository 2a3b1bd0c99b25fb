"""Who is to blame when a run stands still or breaks: the heartbeats of all ranks, read together."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.plan.layout import Layout

INTERVAL = 2.0  # s between two writes of a rank that stays in its phase
WRITES_PER_SECOND = 500  # of all ranks together: what a shared file system takes without noticing
SHOWN = 8  # ranks that are listed at most


@dataclass(frozen=True)
class Beat:
    """One sign of life. coords: for people. idle: s without progress in this phase. time: Unix, of the writer.

    frame: innermost Python frame of the main thread. waiting: that frame is in a collective or a pipeline exchange.
    state: running, ended, failed, lost (it failed because a collective did), hung (it has ended itself).
    """

    rank: int
    coords: str
    phase: str
    step: int
    idle: float
    frame: str
    waiting: bool
    state: str
    pid: int
    host: str
    time: float


def beat_path(folder: Path, rank: int) -> Path:
    """``folder``: ``RUN_DIR/ranks``."""
    return folder / f"rank_{rank:05d}.json"


@dataclass(frozen=True)
class Seen:
    """A heartbeat as it is found. age: s that the file is older than the newest one of all ranks."""

    beat: Beat
    age: float


def read_beats(folder: Path, world_size: int, since: float) -> dict[int, Seen]:
    """The heartbeats of this run by rank. since: Unix time; what is older was left by an earlier start.

    Ages are differences of the files' times: one clock, that of the file system. What cannot be read is left out.
    """
    found: dict[int, tuple[Beat, float]] = {}
    for rank in range(world_size):
        path = beat_path(folder, rank)
        try:
            beat, written = Beat(**json.loads(path.read_text())), path.stat().st_mtime
        except (OSError, ValueError, TypeError):
            continue
        if beat.time >= since:
            found[rank] = (beat, written)
    newest = max((written for _, written in found.values()), default=0.0)
    return {rank: Seen(beat, newest - written) for rank, (beat, written) in found.items()}


def forget(folder: Path) -> None:
    """Remove the heartbeats of an earlier start."""
    for path in folder.glob("rank_*.json"):
        path.unlink(missing_ok=True)


def last_seen(seen: Seen | None) -> str:
    """`` while training at step 7``; empty for a rank that has not reported yet."""
    return f" while {seen.beat.phase} at step {seen.beat.step}" if seen else ""


def suspects(layout: Layout, beats: Mapping[int, Seen], hung: bool = True) -> list[str]:
    """One line for each rank that the others wait for, from the surest kind of evidence that there is.

    The kinds: a rank that failed by itself; one whose process is gone or does not write any more; one that has
    never reported; one that is not in a collective (which says something of a hang only, when all others have waited
    for long). Empty when nothing of this is seen.
    """
    stale = 3 * INTERVAL + 2 * layout.world_size / WRITES_PER_SECOND
    kinds: list[list[str]] = [[], [], [], []]
    for rank in range(layout.world_size):
        name, seen = layout.describe(rank), beats.get(rank)
        if seen is None:
            kinds[2].append(f"{name} has not reported since the run was started")
            continue
        beat, where = seen.beat, last_seen(seen)
        if beat.state == "failed":
            kinds[0].append(f"{name} failed{where}")
        elif beat.state == "running" and _gone(beat):
            kinds[1].append(f"{name} has died{where}: process {beat.pid} on {beat.host} is gone")
        elif beat.state == "running" and seen.age > stale:
            kinds[1].append(
                f"{name} has given no sign of life for {seen.age:.0f} s (stopped, or its node is gone); it was last "
                f"seen{where}, in {beat.frame}"
            )
        elif hung and beat.state in ("running", "hung") and not beat.waiting:
            kinds[3].append(f"{name} is not in a collective{where}: for {beat.idle:.0f} s in {beat.frame}")
    lines = next((lines for lines in kinds if lines), [])
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} more ranks"]
    return lines


def _gone(beat: Beat) -> bool:
    """Whether the process is known to be gone; only a process of this machine can be asked for."""
    if beat.host != socket.gethostname():
        return False
    try:
        os.kill(beat.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        return Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
