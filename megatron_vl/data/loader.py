"""Micro-batches of one rank, step by step, prepared in the background by spawned processes.

The only state is the number of the next step: a loader that is built with `start_step=k` continues exactly
where another one stopped after step k - 1, in any layout.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker

from torch.utils.data import DataLoader, Dataset

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.batch import MicroBatch, collate, empty_row
from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.order import SampleOrder, rows_for_step
from megatron_vl.data.rows import PlannedImage, RowBuilder
from megatron_vl.errors import DataError
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.vision_share import share_step

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


Planned = tuple[
    MicroBatch, list[list[PlannedImage]]
]  # without pixels, and the images of each of its documents


@dataclass(frozen=True)
class Place:
    """Which part of the data a rank takes.

    dp_rank, dp_size: its data-parallel coordinate. vision_rank: its number among the vision_size ranks that
    share out the views of a micro-batch, or with whole_steps those of all micro-batches of a step together; None on
    ranks without the tower, which decode nothing.
    """

    dp_rank: int = 0
    dp_size: int = 1
    vision_rank: int | None = 0
    vision_size: int = 1
    whole_steps: bool = False


@dataclass
class MicroBatches(Dataset):
    """All micro-batches of one rank as a list: item step x M + m is number m of the M in a step.

    num_samples: global sample numbers from this on are filler (an evaluation set that does not fill its last
    step); None = the data are repeated for ever.
    """

    source: JsonlSource
    order: SampleOrder
    builder: RowBuilder
    place: Place
    micro_batch_size: int
    global_batch_size: int
    num_samples: int | None = None

    @property
    def per_step(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.place.dp_size)

    def __getitem__(self, item: int) -> MicroBatch:
        return with_shares([self.planned(item)], self.builder, self.place)[0]

    def planned(self, item: int) -> Planned:
        """A micro-batch without pixels."""
        step, micro_batch = divmod(item, self.per_step)
        place = self.place
        numbers = rows_for_step(
            step, self.global_batch_size, self.micro_batch_size, place.dp_rank, place.dp_size
        )[micro_batch]
        built = [
            self.builder.build(self.source[self.order.index(number)])
            if self.num_samples is None or number < self.num_samples
            else (empty_row(""), [])
            for number in numbers
        ]
        model = self.builder.model
        batch = collate(
            [row for row, _ in built],
            self.builder.data.seq_length,
            model.tokens.endoftext,
            model.vision.image_size,
            model.vision.crop_size,
        )
        return batch, [images for _, images in built]


def with_shares(planned: Sequence[Planned], builder: RowBuilder, place: Place) -> list[MicroBatch]:
    """Micro-batches with the pixels of this rank's shares: of one, or of all of a step where `place` says so."""
    if place.vision_rank is None:
        return [batch for batch, _ in planned]
    kinds, costs = [batch.view_kinds for batch, _ in planned], view_costs(builder.model)
    shares = share_step(kinds, place.vision_size, costs, place.whole_steps)
    return [
        builder.with_pixels(batch, images, mine[place.vision_rank])
        for (batch, images), mine in zip(planned, shares)
    ]


@dataclass
class WholeSteps(Dataset):
    """The micro-batches of one rank step by step, for ranks that share out the views of whole steps."""

    micro_batches: MicroBatches

    def __getitem__(self, step: int) -> list[MicroBatch]:
        source, per_step = self.micro_batches, self.micro_batches.per_step
        planned = [source.planned(step * per_step + number) for number in range(per_step)]
        return with_shares(planned, source.builder, source.place)


class Loader:
    """Hands out the micro-batches of one step after another.

    `next_step()` returns the list of a step and moves on; StopIteration after `num_steps` steps in all (None
    = no end). `step`: number of the next one. `wait_seconds`: how long the last `next_step` waited for data.
    Raises DataError when a worker process dies or gives nothing for `timeout_seconds`.
    """

    def __init__(
        self,
        micro_batches: MicroBatches,
        start_step: int = 0,
        num_steps: int | None = None,
        timeout_seconds: float = 600,
    ):
        data = micro_batches.builder.data
        self.micro_batches = micro_batches
        self.step = start_step
        self.num_steps = num_steps
        self.wait_seconds = 0.0
        whole_steps = micro_batches.place.whole_steps
        self._items = 1 if whole_steps else micro_batches.per_step  # of a step
        self._numbers = _Numbers(self, self._items)
        self._background = background = data.num_workers > 0
        self._data_loader = DataLoader(
            WholeSteps(micro_batches) if whole_steps else micro_batches,
            batch_size=None,
            sampler=self._numbers,
            collate_fn=_unchanged,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch if background else None,
            multiprocessing_context="spawn" if background else None,
            persistent_workers=background,
            timeout=timeout_seconds if background else 0,
        )
        self._timeout_seconds = timeout_seconds
        self._iterator: Iterator[MicroBatch | list[MicroBatch]] | None = None
        self._workers: list[multiprocessing.process.BaseProcess] = []
        if background:
            atexit.register(_end, self._workers)  # before multiprocessing asks them by SIGTERM, and waits

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        return self.next_step()

    def next_step(self, tick: Callable[[], None] | None = None) -> list[MicroBatch]:
        """The micro-batches of step `self.step`, in order. tick: called for each, as a sign of progress."""
        if self.num_steps is not None and self.step >= self.num_steps:
            raise StopIteration
        begin = time.perf_counter()
        try:
            if self._iterator is None:
                with _without_stop_signals(), self._starting():
                    self._iterator = iter(self._data_loader)
            batches = []
            for _ in range(self._items):
                item = next(self._iterator)
                batches += item if isinstance(item, list) else [item]
                if tick is not None:
                    tick()
        except (RuntimeError, EOFError, OSError) as error:
            # PyTorch reports dead and silent workers as plain RuntimeErrors; a worker that dies while it
            # hands over its tensors shows as a broken connection. "Caught ..." is an error of a worker's own.
            broken = self._background and not isinstance(error, RuntimeError)
            text = "a DataLoader worker ended while handing over its micro-batch." if broken else str(error)
            if str(error).startswith("Caught") or not (broken or text.startswith("DataLoader")):
                raise
            raise DataError(
                f"loading of step {self.step} failed: {text.splitlines()[0]} A worker that is killed "
                "has mostly run out of memory, or of /dev/shm in a container (start it with --ipc=host); one "
                f"that is silent for {self._timeout_seconds:g} s has mostly lost its file system. "
                "data.num_workers=0 loads in the training process"
            ) from error
        self.step += 1
        self.wait_seconds = time.perf_counter() - begin
        return batches

    def seek(self, step: int) -> None:
        """Makes `step` the next one; the worker processes stay."""
        self.step = step
        self._iterator = None

    def close(self) -> None:
        """Ends the worker processes at once, also in the middle of a sample."""
        _end(self._workers)
        self._iterator = None
        self._data_loader = None
        self.micro_batches.source.close()

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """Take note of the processes that are started inside."""
        before = set(multiprocessing.active_children())
        try:
            yield
        finally:
            self._workers += set(multiprocessing.active_children()) - before


def train_loader(
    data: DataConfig,
    model: ModelConfig,
    place: Place,
    micro_batch_size: int,
    global_batch_size: int,
    start_step: int = 0,
    num_steps: int | None = None,
    timeout_seconds: float = 600,
) -> Loader:
    """Loader over data.train: shuffled anew each epoch, without end unless num_steps is given."""
    source = JsonlSource(data.train)
    micro_batches = MicroBatches(
        source,
        SampleOrder(len(source), data.seed),
        RowBuilder(data, model),
        place,
        micro_batch_size,
        global_batch_size,
    )
    return Loader(micro_batches, start_step, num_steps, timeout_seconds)


def eval_loader(
    data: DataConfig,
    model: ModelConfig,
    place: Place,
    micro_batch_size: int,
    global_batch_size: int,
    num_samples: int = 0,
    timeout_seconds: float = 600,
) -> Loader:
    """Loader over the first num_samples of data.eval (0 = all) in file order; `seek(0)` restarts it."""
    source = JsonlSource(data.eval)
    count = min(num_samples, len(source)) if num_samples else len(source)
    micro_batches = MicroBatches(
        source,
        SampleOrder(len(source), data.seed, shuffle=False),
        RowBuilder(data, model),
        place,
        micro_batch_size,
        global_batch_size,
        num_samples=count,
    )
    return Loader(micro_batches, 0, -(-count // global_batch_size), timeout_seconds)


class _Numbers:
    """Sampler: item numbers from the loader's next step on, which is read when an iteration starts."""

    def __init__(self, loader: Loader, per_step: int):
        self._loader = loader
        self._per_step = per_step

    def __iter__(self) -> Iterator[int]:
        item = self._loader.step * self._per_step
        last = None if self._loader.num_steps is None else self._loader.num_steps * self._per_step
        while last is None or item < last:
            yield item
            item += 1


@contextmanager
def _without_stop_signals() -> Iterator[None]:
    """Processes that are started inside never see SIGTERM or SIGUSR1; this one sees them afterwards.

    Batch systems signal every process of a job, but a request to stop is for the training process alone: it still
    needs its workers, and ends them itself. They end by themselves when their parent is gone.
    """
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # starts a process as well, and unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _end(workers: list[multiprocessing.process.BaseProcess]) -> None:
    """Kill worker processes and forget them. PyTorch's handler would call their end an error."""
    if not workers:
        return
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if in_main:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    workers.clear()


def _unchanged(batch: MicroBatch) -> MicroBatch:
    return batch
