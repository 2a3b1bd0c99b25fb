"""Local ranks in spawned processes: one world that is kept and used again, or one run of a program.

Importing Megatron-Core costs seconds per process, so tests and ``tools/check_parity.py`` start the processes once
and give them many jobs. Each job gets process groups of its own over the first ``n`` ranks.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_vl.errors import MegatronVLError


class RankFailed(MegatronVLError):
    """A local rank raised, died or did not answer in time; the message names it.

    signal: the signal that ended the rank, None where it was no signal.
    """

    def __init__(self, message: str, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class _Job:
    number: int
    size: int
    function: Callable[..., Any]
    args: tuple


def _rank_main(rank: int, port: int, device: str, timeout: float, pipe: Connection) -> None:
    """One process of the world: take a job, join its group, answer, until the pipe closes."""
    faulthandler.enable()  # where Python was when native code ends the process
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["LOCAL_RANK"] = str(rank)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import torch.distributed as dist

    from megatron_vl.parallel.runtime import choose_device

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    choose_device(device, rank if device == "cuda" else 0)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout))
    _send(pipe, ("ready", None))
    imported = 0
    while True:
        try:
            job: _Job = _receive(pipe)
        except EOFError:
            return
        try:
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                store=dist.PrefixStore(f"job{job.number}", store),
                rank=rank,
                world_size=job.size,
                timeout=timedelta(seconds=timeout),
            )
            answer = ("done", job.function(*job.args))
            _leave()
        except BaseException as error:  # the parent decides; nothing is swallowed
            answer = ("failed", (f"{type(error).__name__}: {error}", traceback.format_exc()))
        _send(pipe, answer)
        del job, answer
        if (
            len(sys.modules) > imported
        ):  # else each job's two collections go through all that was ever imported
            imported = len(sys.modules)
            gc.collect()
            gc.freeze()


def _leave() -> None:
    """End the job's groups for good: a group that anything still refers to keeps its threads, which wake up 100
    times a second. Models end in reference cycles, and rotary embeddings sit in a cache with their group.
    """
    import torch.distributed as dist
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_vl.parallel.runtime import stop

    stop()
    RotaryEmbedding.forward.cache_clear()
    gc.collect()
    dist.destroy_process_group()
    gc.collect()


def _send(pipe: Connection, item: Any) -> None:
    """By value: torch's own pickler would pass each tensor as an open file, and a thousand are the usual limit."""
    pipe.send_bytes(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))


def _receive(pipe: Connection) -> Any:
    """What `_send` sent; the bytes come from our own processes."""
    return pickle.loads(pipe.recv_bytes())


class LocalWorld:
    """``size`` spawned ranks on this machine that run functions together.

    device: "cpu" (gloo) or "cuda" (nccl, one device per rank). timeout: seconds that a collective may wait.
    """

    def __init__(self, size: int, device: str = "cpu", timeout: float = 120.0) -> None:
        import torch.distributed as dist

        self.size, self.timeout, self._jobs = size, timeout, 0
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (rank, self._store.port, device, timeout, theirs)
            process = context.Process(target=_rank_main, args=args, daemon=True, name=f"rank{rank}")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(size, time.monotonic() + 300.0)

    def run(self, size: int, function: Callable[..., Any], *args: Any, limit: float = 600.0) -> list[Any]:
        """Call ``function(*args)`` on ranks 0..size-1 of a fresh process group; their answers in rank order.

        Raises:
            RankFailed: a rank raised (the first one to do so is named), died, or took longer than ``limit`` s.
                The world is closed then: its other ranks may hang in a collective.
        """
        assert size <= self.size, f"the world has {self.size} ranks"
        self._jobs += 1
        for pipe in self._pipes[:size]:
            _send(pipe, _Job(self._jobs, size, function, args))
        return self._collect(size, time.monotonic() + limit)

    def _collect(self, size: int, deadline: float) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < size:
            pending = {self._pipes[r]: r for r in range(size) if r not in answers}
            sentinels = {self._processes[r].sentinel: r for r in pending.values()}
            ready = wait([*pending, *sentinels], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                waiting = sorted(pending.values())
                self.close()
                raise RankFailed(
                    f"rank(s) {waiting} did not answer in time: a hang in a collective; see the ranks' own output"
                )
            for item in ready:
                rank = pending[item] if item in pending else sentinels[item]
                if rank in answers:
                    continue
                answers[rank] = self._receive(rank)
        return [answers[r] for r in range(size)]

    def _receive(self, rank: int) -> Any:
        pipe, process = self._pipes[rank], self._processes[rank]
        try:
            kind, value = _receive(pipe) if pipe.poll(1.0) else ("died", None)
        except EOFError:
            kind, value = "died", None
        if kind in ("ready", "done"):
            return value
        if kind == "died":
            process.join(1.0)
        else:  # a rank that lost its peer fails too; the peer's death is the cause, and may show a moment later
            wait([p.sentinel for p in self._processes], timeout=0.5)
        dead = {r: p.exitcode for r, p in enumerate(self._processes) if p.exitcode is not None}
        self.close()
        if dead or kind == "died":
            rank, code = next(iter(dead.items()), (rank, None))
            raise RankFailed(f"rank {rank} died with exit code {code}", -code if code and code < 0 else None)
        raise RankFailed(f"rank {rank} failed: {value[0]}\n{value[1]}")

    @property
    def alive(self) -> bool:
        """Whether every process is still there."""
        return bool(self._processes) and all(p.is_alive() for p in self._processes)

    def close(self) -> None:
        """End the processes of this world."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(5.0)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def __enter__(self) -> LocalWorld:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
