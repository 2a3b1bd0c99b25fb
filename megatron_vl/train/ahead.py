"""Long work of the first rank that all wait for, without a collective that would run into its time-out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_vl.errors import DataError, MegatronVLError
from megatron_vl.parallel.heartbeat import Phase
from megatron_vl.parallel.runtime import Runtime

PAUSE_SECONDS = 0.5


def first_does(
    work: Callable[[Callable[[str], None]], None], runtime: Runtime, phase: Phase, say: Callable[[str], None]
) -> None:
    """Rank 0 does ``work`` in a thread while all ranks meet in short collectives; every rank calls it.

    work: gets a function to report with, whose calls count as progress for the watch over hanging ranks.

    Raises:
        DataError: on every rank, when the work has failed.
    """
    reports, failed = [0], [""]

    def report(line: str) -> None:
        reports[0] += 1
        say(line)

    def run() -> None:
        try:
            work(report)
        except MegatronVLError as error:
            failed[0] = str(error)
        except Exception as error:  # told to the others, who wait
            failed[0] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=run, daemon=True, name="ahead")
    if runtime.rank == 0:
        thread.start()
    seen = -1
    while True:
        state = torch.tensor([thread.is_alive(), reports[0]], dtype=torch.int64, device=runtime.device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        working, count = state.tolist()
        if count != seen:
            seen = count
            phase.tick()
        if not working:
            break
        time.sleep(PAUSE_SECONDS)
    told: list[str] = [failed[0]]
    dist.broadcast_object_list(told, src=0)
    if told[0]:
        raise DataError(told[0])
