"""What the ranks do for the tests of saving."""

from __future__ import annotations

import contextlib
import io
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from megatron_vl.checkpoint import saver
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.config.load import LoadedRun
from megatron_vl.errors import MegatronVLError
from megatron_vl.train import prepare
from megatron_vl.train.step import train_step
from tests.train.on_ranks import prepared, save_now


@dataclass
class Overlapped:
    """A save that was held back while training went on. begin_seconds: of the call."""

    pending: bool
    ready: bool
    visible: list[str]
    moved: bool
    stored_is_then: bool


def overlapped(loaded: LoadedRun, other_folder: str) -> Overlapped:
    """Begin a save whose writing is held back, train a step, let it write, publish it."""
    release, plain = threading.Event(), saver.write

    def held(*args, **kwargs):
        assert release.wait(60)
        return plain(*args, **kwargs)

    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
        progress = prepare.resume(run)
        weights = run.saver.live.weights()
        train_step(run.parts, run.feed.next_step(), 1e-2)
        then = [slot.values.clone() for slot in weights]
        steps = run.saver.live.steps()
        with patch.object(saver, "write", held):
            run.saver.begin(Progress(1, 1, progress.data))
            pending, ready = run.saver.pending, run.saver.ready
            train_step(run.parts, run.feed.next_step(), 1e-2)
            visible = sorted(path.name for path in run.saver.folder.iterdir())
            release.set()
            where = run.saver.finish()
        moved = any(not torch.equal(slot.values, old) for slot, old in zip(weights, then))
        for slot in weights:
            slot.values.zero_()
        run.saver.live.fill(Stored(where))
        same = all(torch.equal(slot.values, old) for slot, old in zip(weights, then))
        same = same and run.saver.live.steps() == steps and set(steps.values()) == {1}
    return Overlapped(pending, ready, visible, moved, same)


def stalled(loaded: LoadedRun, rank: int) -> tuple[str, float]:
    """The error of a save that one rank does not get done, and how long it took."""
    plain, given_up = saver.write, threading.Event()

    def slow(*args, **kwargs):
        given_up.wait(30)
        return plain(*args, **kwargs)

    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
        begin = time.monotonic()
        with patch.object(saver, "write", slow if run.parts.runtime.rank == rank else plain):
            run.saver.begin(Progress(5, 5))
            try:
                run.saver.finish()
            except MegatronVLError as error:
                taken = time.monotonic() - begin
                given_up.set()
                for thread in threading.enumerate():  # it would keep the job's groups
                    if thread.name.startswith("save"):
                        thread.join(30)
                return f"{type(error).__name__}: {error}", taken
    return "", 0.0


def many(loaded: LoadedRun, steps: int) -> str:
    """Save after each of ``steps`` steps without training; what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, prepared(loaded) as run:
        for step in range(1, steps + 1):
            run.saver.begin(Progress(step, step))
        run.saver.finish()
    return printed.getvalue()


def error_of_saving(loaded: LoadedRun) -> str:
    """The error of a save at step 2; "" for none."""
    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
        try:
            save_now(run, Progress(2, 2))
        except MegatronVLError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def resaved(loaded: LoadedRun, folder: str) -> str:
    """Resume and save again at once below ``folder``; what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, prepared(loaded) as run:
        progress = prepare.resume(run)
        run.saver.folder = Path(folder)
        run.saver.begin(progress)
        run.saver.finish()
    return printed.getvalue()


def error_of_saving_without_check(loaded: LoadedRun) -> str:
    """As `error_of_saving` where the disk looks empty before writing: a quota, or others who write."""
    usage = shutil._ntuple_diskusage(1 << 50, 0, 1 << 50)
    with patch("shutil.disk_usage", lambda path: usage):
        return error_of_saving(loaded)


def error_of_saving_in(loaded: LoadedRun, folder: str) -> str:
    """The error of a save below another folder."""
    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
        run.saver.folder = Path(folder)
        try:
            save_now(run, Progress(2, 2))
        except MegatronVLError as error:
            return f"{type(error).__name__}: {error}"
    return ""
