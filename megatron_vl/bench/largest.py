"""One step under torch.profiler: a Chrome trace, and the operations that take most of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SHOWN = 10


def traced(
    take: Callable[[], Any], path: str, device: torch.device, write: bool
) -> list[dict[str, Any]] | None:
    """Runs ``take`` once; where ``write`` is true the trace goes to ``path`` (chrome://tracing, Perfetto).

    Returns name, calls, seconds and share of the largest operations by their own time on the device.
    """
    if not write:
        take()
        return None
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        take()
        if on_gpu:
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(path)
    return largest(profiler.key_averages(), on_gpu)


def largest(averages: Any, on_gpu: bool) -> list[dict[str, Any]]:
    """The ``SHOWN`` largest by own time; on a GPU kernels and copies only."""

    def own(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = [e for e in averages if not on_gpu or e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(map(own, events)) or 1.0
    events.sort(key=own, reverse=True)
    return [
        {"name": e.key, "calls": e.count, "seconds": own(e) / 1e6, "share": own(e) / total}
        for e in events[:SHOWN]
    ]
