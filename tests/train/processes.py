"""Real runs of `python -m megatron_vl pretrain`: start, watch, hurt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


class Command:
    """A command from the root of the repository in a session of its own; output goes to files."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.out, self.err = folder / "stdout.txt", folder / "stderr.txt"
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=env,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int:
        """Exit code; AssertionError with the output when it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.output}") from None

    def wait_for(self, done: Callable[[], bool], seconds: float, pause: float = 0.1) -> None:
        """Until ``done()``; AssertionError with the output when the command ends before, or takes longer."""
        deadline = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None, f"ended with {self.process.poll()}\n{self.output}"
            assert time.monotonic() < deadline, f"nothing after {seconds} s\n{self.output}"
            time.sleep(pause)

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    @property
    def output(self) -> str:
        return f"{self.stdout[-3000:]}\n{self.stderr[-3000:]}"

    @property
    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that the launcher has started, by rank."""
        return {int(p.environ()["RANK"]): p for p in psutil.Process(self.process.pid).children()}

    def close(self) -> None:
        """End it with all that it has started."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()


def pretrain(folder: Path, config: Path, ranks: int, *overrides: str) -> Command:
    """`python -m megatron_vl pretrain CONFIG --nproc N ...`."""
    return Command(folder, "-m", "megatron_vl", "pretrain", str(config), *overrides, "--nproc", str(ranks))


def beat(run: Path, rank: int) -> dict[str, Any]:
    """The heartbeat of a rank, {} before the first one."""
    try:
        return json.loads((run / "ranks" / f"rank_{rank:05d}.json").read_text())
    except FileNotFoundError:
        return {}


def wait_for_phase(
    command: Command, run: Path, phase: str, step: int, rank: int = 0, seconds: float = 240
) -> dict:
    """Until ``rank`` is in ``phase`` of ``step`` or a later one; its heartbeat."""
    seen: dict[str, Any] = {}

    def there() -> bool:
        seen.update(beat(run, rank))
        return seen.get("phase") == phase and seen["step"] >= step and seen["state"] == "running"

    command.wait_for(there, seconds, pause=0.002)
    return seen
