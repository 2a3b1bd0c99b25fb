"""Saving while training goes on: copy, write in the background, publish when every rank is done.

``begin`` copies this rank's pieces to host memory (the only time that training waits for) and starts a thread that
writes and fsyncs them; the loop calls ``commit`` at a later step boundary, once all ranks are ready. Every method
but the properties is called by all ranks at the same point.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vl.checkpoint.folder import (
    ASIDE,
    checkpoints,
    name_of,
    point_latest,
    set_aside,
)
from megatron_vl.checkpoint.live import Live
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.checkpoint.stored import FORMAT
from megatron_vl.checkpoint.torch_dist import Item, Written, publish, write
from megatron_vl.config.schema import CheckpointConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel.runtime import Runtime

REMOVING_SECONDS = 30.0


@dataclass
class _Job:
    """A save in flight. steps: Adam's counts of this rank. thread writes; problem or written tells how it ended.

    began: time.monotonic().
    """

    progress: Progress
    aside: Path
    final: Path
    steps: dict[str, int]
    began: float
    thread: threading.Thread | None = None
    problem: str = ""
    written: Written | None = None


class Saver:
    """Saves of a run. folder: of its checkpoints. config_yaml: resolved configuration, kept in each checkpoint.

    source_dtypes: number formats of the released tensors that the run began with, for the export; None = fresh.
    say: prints on rank 0.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, live: Live, config_yaml: str, say: Callable[[str], None]
    ) -> None:
        self.folder, self.config, self.live, self.config_yaml, self.say = (
            folder, config, live, config_yaml, say,
        )  # fmt: skip
        self.runtime: Runtime = live.runtime
        self.source_dtypes: Mapping[str, str] | None = None
        self.last: Progress | None = None
        self._job: _Job | None = None
        self._buffers: dict[int, torch.Tensor] = {}
        self._remover: threading.Thread | None = None

    @property
    def pending(self) -> bool:
        """A save has begun and is not published yet; the same on every rank."""
        return self._job is not None

    @property
    def ready(self) -> bool:
        """This rank has nothing left to write, or has failed to, if only because its time is over."""
        job = self._job
        if job is None or not job.thread.is_alive():
            return True
        if time.monotonic() - job.began <= self.config.timeout_seconds:
            return False
        job.problem = (
            f"{self.runtime.name} did not finish writing to {job.aside} within checkpoint.timeout_seconds = "
            f"{self.config.timeout_seconds}: a file system that stalls, or a limit that is too short for it"
        )
        return True

    def begin(self, progress: Progress) -> None:
        """Copy the state of ``progress`` and start writing it; an earlier save is finished first.

        Raises:
            CheckpointError: the earlier save failed, or the folder cannot take this one.
        """
        if self.pending:
            self.finish()
        final = self.folder / name_of(progress.step)
        aside = final.with_name(final.name + ASIDE)
        items = self.live.items(_Staging(self._buffers))
        self._prepare(aside, sum(item.nbytes for item in items))
        job = _Job(progress, aside, final, self.live.steps(), time.monotonic())
        job.thread = threading.Thread(target=self._write, args=(job, items), daemon=True, name="save")
        job.thread.start()
        self._job, self.last = job, progress
        if not self.config.async_save:
            self.finish()

    def _prepare(self, aside: Path, nbytes: int) -> None:
        """Make the folder to write in, where there is room for the sum over ranks."""
        total = torch.tensor([nbytes], device=self.runtime.device)
        dist.all_reduce(total)
        problem = self._problems(self._make(aside, int(total.item())) if self.runtime.rank == 0 else "")
        if problem:
            raise CheckpointError(f"{problem}. {self._intact()}")
        if not aside.is_dir():
            problem = f"{self.runtime.name} cannot see {aside}: run_dir must be on a file system that all nodes share"
        problem = self._problems(problem)
        if problem:
            raise CheckpointError(problem)

    def _make(self, aside: Path, nbytes: int) -> str:
        """Rank 0: remove what interrupted saves have left, make the folder; the problem, if there is one."""
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            free = shutil.disk_usage(aside).free
            if free >= nbytes:
                return ""
            aside.rmdir()
        except (OSError, CheckpointError) as error:
            return f"{aside} could not be made: {error}; give this user write access, or use another run_dir"
        return (
            f"{aside} needs {nbytes:,} bytes and its disk has {free:,} left: make room, or keep fewer with "
            "checkpoint.keep_last"
        )

    def _write(self, job: _Job, items: list[Item]) -> None:
        """The thread: every way in which it can fail becomes a sentence for ``commit``."""
        try:
            job.written = write(job.aside, items, prefix=f"__{self.runtime.rank}_")
        except Exception as error:  # OSError, RuntimeError of torch.save: disk full, no permission, I/O error
            job.problem = f"{self.runtime.name} could not write to {job.aside}: {_first_line(error)}"

    def commit(self) -> Path:
        """Publish the save in flight; all ranks are ``ready``. Returns the checkpoint's folder.

        Raises:
            CheckpointError: on every rank, when any could not write; nothing of the save is left, and the older
                checkpoints are untouched.
        """
        job = self._job
        self._job = None
        problem = self._problems(job.problem)
        if not problem:
            problem = self._publish(job)
        if problem:
            if self.runtime.rank == 0:
                shutil.rmtree(job.aside, ignore_errors=True)
            raise CheckpointError(f"saving {job.final} failed: {problem}. {self._intact()}")
        seconds = time.monotonic() - job.began
        self.say(f"saved {job.final} (step {job.progress.step}, {seconds:.1f} s from copy to publication)")
        return job.final

    def _publish(self, job: _Job) -> str:
        """Rank 0 completes the folder and makes it visible; the problem, the same on every rank."""
        world = self.runtime.layout.world_size
        mine = (job.written, job.steps)
        everyone: list | None = [None] * world if self.runtime.rank == 0 else None
        dist.gather_object(mine, everyone, dst=0)
        problem = ""
        if self.runtime.rank == 0:
            try:
                steps = {name: count for _, counts in everyone for name, count in counts.items()}
                state = self._state(job.progress, steps)
                publish(job.aside, job.final, [w for w, _ in everyone], state, self.config_yaml)
            except (OSError, ValueError, RuntimeError) as error:
                problem = f"{self.runtime.name} could not complete it: {_first_line(error)}"
            if not problem:
                self._retire(job)
        return self._problems(problem)

    def _retire(self, job: _Job) -> None:
        """``latest`` and retention. The checkpoint is there, so what fails here is only said."""
        try:
            point_latest(job.final)
            keep = (self.config.keep_last, self.config.keep_every)
            going, problems = set_aside(self.folder, job.progress.step, *keep)
        except (OSError, CheckpointError) as error:
            going, problems = [], [f"{job.final} is complete, but the folder is not in order: {error}"]
        for sentence in problems:
            self.say(sentence)
        self._remove(list(dict.fromkeys(going)))

    def _remove(self, folders: Sequence[Path]) -> None:
        """In the background: it may take minutes on a large file system."""
        if folders:
            self._join_remover()
            self._remover = threading.Thread(target=_remove, args=(folders,), daemon=True, name="remove")
            self._remover.start()

    def _join_remover(self) -> None:
        if self._remover is not None:
            self._remover.join(REMOVING_SECONDS)  # what is left then, the next save removes

    def finish(self) -> Path | None:
        """Wait for the save in flight and publish it; None when there is none.

        Raises:
            CheckpointError: as `commit`, and when a rank is not done within checkpoint.timeout_seconds.
        """
        if self._job is None:
            self._join_remover()
            return None
        pause = 0.01
        while True:
            writing = torch.tensor([not self.ready], dtype=torch.int32, device=self.runtime.device)
            dist.all_reduce(writing, op=dist.ReduceOp.MAX)
            if not writing.item():
                where = self.commit()
                self._join_remover()
                return where
            time.sleep(pause)
            pause = min(0.5, pause * 2)

    def _state(self, progress: Progress, steps: Mapping[str, int]) -> dict:
        return {
            "format": FORMAT,
            "progress": asdict(progress),
            "layout": asdict(self.runtime.layout),
            "source_dtypes": dict(self.source_dtypes) if self.source_dtypes is not None else None,
            "optimizer_steps": dict(steps),
        }

    def _intact(self) -> str:
        try:
            if not checkpoints(self.folder):
                return f"There is no older checkpoint in {self.folder}"
        except CheckpointError as error:
            return str(error)
        return f"The older checkpoints in {self.folder} are intact; the same command resumes from the newest"

    def _problems(self, mine: str) -> str:
        return all_problems(mine, self.runtime)


class _Staging:
    """Copies of live values in host memory; the buffers are kept for the next save (pinned on CUDA)."""

    def __init__(self, buffers: dict[int, torch.Tensor]) -> None:
        self.buffers, self.count = buffers, 0

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        buffer = self.buffers.get(self.count)
        if buffer is None or (buffer.shape, buffer.dtype) != (values.shape, values.dtype):
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self.buffers[self.count] = buffer
        self.count += 1
        buffer.copy_(values)
        return buffer


def all_problems(mine: str, runtime: Runtime) -> str:
    """The problems of all ranks in one string, on every rank, so that all raise together; "" when there is none."""
    problems: list[str] = [""] * runtime.layout.world_size
    dist.all_gather_object(problems, mine)
    return "; ".join(dict.fromkeys(p for p in problems if p))


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
