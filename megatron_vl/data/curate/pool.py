"""Work over spawned processes: results in any order, an error that says so when a process dies."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megatron_vl.data.workers import end_with_parent
from megatron_vl.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

_WAITING_PER_WORKER = 2


class Workers:
    """Processes that are started once and used for several lists of tasks; close them, or use `with`.

    count: 1 = no process, everything happens in this one. `initializer(*initargs)` runs once in each process,
    before its first task; it and the tasks are pickled.
    """

    def __init__(self, count: int, initializer: Callable[..., None], initargs: tuple[Any, ...]):
        self._count = count
        self._initializer, self._initargs = initializer, initargs
        self._executor: ProcessPoolExecutor | None = None
        if count <= 1:
            initializer(*initargs)

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """`function(task)` of every task, as they get ready.

        Only a few tasks are in flight, so `tasks` may be larger than memory. Raises DataError when a process
        dies.
        """
        if self._count <= 1:
            yield from map(function, tasks)
            return
        executor = self._started()
        try:
            pending: set[Future[Result]] = set()
            for task in tasks:
                pending.add(executor.submit(function, task))
                if len(pending) >= self._count * _WAITING_PER_WORKER:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, most likely for lack of memory; run the command again, with fewer "
                "--workers or a smaller failed_images.max_image_pixels: finished work is not repeated"
            ) from error

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self._count,
                mp_context=multiprocessing.get_context("spawn"),  # torch and threads do not survive a fork
                initializer=_start,
                initargs=(self._initializer, self._initargs),
            )
        return self._executor


def _start(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets begun work end
    end_with_parent()
    initializer(*initargs)
