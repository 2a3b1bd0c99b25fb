"""Times of single operations: device events and a flushed L2 on CUDA, the clock on CPU; medians of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU
WARM_UP = 3


@dataclass(frozen=True)
class Timer:
    """repeats: runs that count, at most. seconds: fewer, when they have taken so long."""

    device: torch.device
    repeats: int = 30
    seconds: float = 2.0

    def median(self, run: Callable[[], Any]) -> float:
        """Median seconds of ``run`` on the device, its inputs not in the cache (CUDA)."""
        return statistics.median(self.times(run))

    def times(self, run: Callable[[], Any]) -> list[float]:
        """Seconds of each run that counts."""
        on_gpu = self.device.type == "cuda"
        for _ in range(min(WARM_UP, self.repeats)):
            run()
        if not on_gpu:
            return self._on_cpu(run)
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        torch.cuda.synchronize(self.device)
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < self.repeats and (not found or time.perf_counter() - began < self.seconds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        return found

    def _on_cpu(self, run: Callable[[], Any]) -> list[float]:
        found: list[float] = []
        while len(found) < self.repeats and (not found or sum(found) < self.seconds):
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
        return found


def gemm_ceiling(timer: Timer, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product of random numbers through torch."""
    return product_rate(timer, dtype, size, size, size)


def product_rate(timer: Timer, dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    """FLOP/s of ``[rows, inner] @ [columns, inner]^T``, as a linear layer has it."""
    a = torch.randn(rows, inner, device=timer.device, dtype=dtype)
    b = torch.randn(columns, inner, device=timer.device, dtype=dtype)
    return 2.0 * rows * inner * columns / timer.median(lambda: a @ b.t())


def copy_ceiling(timer: Timer, size: int) -> float:
    """Bytes per second of a copy within the device, read and written both counted. size: bytes."""
    source = torch.randn(size // 4, device=timer.device)
    target = torch.empty_like(source)
    return 2.0 * size / timer.median(lambda: target.copy_(source))
