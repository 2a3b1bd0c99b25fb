"""Where the time of a training step goes, on one rank: timers around the named parts of `train/step.py`.

The step itself is the trainer's; its parts are looked up by name in their module, so they can be wrapped while a
benchmark runs. On CUDA times are those of events on the default stream, read when the step has ended: nothing waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_vl.train import step
from megatron_vl.train.build import Parts
from megatron_vl.train.views import StepViews

# function of train/step.py: phase. `finish_gradients` runs inside `forward_backward`.
TIMED = {
    "begin_step": "zero gradients",
    "forward_backward": "forward and backward",
    "finish_gradients": "gradient reduction",
    "update": "optimizer",
}
# method of `StepViews`, where the tower stands beside the pipeline: phase. Features and gradients travel within it.
TIMED_VIEWS = {"encode": "vision forward", "backward": "vision backward"}
INSIDE = ("vision forward", "vision backward", "gradient reduction")  # parts of forward and backward
PHASES = (
    "data", "zero gradients", "vision forward", "vision backward", "decoder, head, waiting",
    "gradient reduction", "optimizer", "other",
)  # fmt: skip


class Clock:
    """Marks on the device's time line, and pairs of them by phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pairs: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        """Now: a recorded event on CUDA, seconds elsewhere."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, phase: str, begin: Any, end: Any) -> None:
        """What lies between two marks counts for the phase."""
        self._pairs.append((phase, begin, end))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what runs inside."""
        begin = self.mark()
        yield
        self.add(name, begin, self.mark())

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for name, begin, end in self._pairs:
            seconds = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
            found[name] = found.get(name, 0.0) + seconds
        self._pairs.clear()
        return found


class _BackwardStarts(torch.autograd.Function):
    """Identity; says when the gradient of its output has arrived."""

    @staticmethod
    def forward(ctx, features: torch.Tensor, tell: Callable[[], None]) -> torch.Tensor:
        ctx.tell = tell
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        ctx.tell()
        return gradient, None


class VisionTimes:
    """Time of tower and projector on this rank, forward and backward, by micro-batch.

    A backward pass begins when the gradient of the features is there and ends with the last gradient of a vision
    parameter before the next one begins. Nothing else is ready then: the embeddings' backward comes after it.
    """

    def __init__(self, clock: Clock, chunk: torch.nn.Module) -> None:
        self.clock, self._began, self._last = clock, None, None
        self._encode = chunk.encode_views
        chunk.encode_views = self._timed
        self._chunk = chunk
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._gradient)
            for p in chunk.vision_parameters()
            if p.requires_grad
        ]

    def _timed(self, inputs: Any) -> torch.Tensor:
        with self.clock.phase("vision forward"):
            features = self._encode(inputs)
        if len(features) and features.requires_grad:
            return _BackwardStarts.apply(features, self._starts)
        return features

    def _starts(self) -> None:
        self.close()
        self._began = self.clock.mark()

    def _gradient(self, parameter: torch.Tensor) -> None:
        if self._began is not None:
            self._last = self.clock.mark()

    def close(self) -> None:
        """Book the backward pass that has ended, if there is one; call it at the end of the step."""
        if self._began is not None and self._last is not None:
            self.clock.add("vision backward", self._began, self._last)
        self._began = self._last = None

    def remove(self) -> None:
        """Leave the module as it was."""
        del self._chunk.encode_views
        for hook in self._hooks:
            hook.remove()


@contextmanager
def timed_parts(parts: Parts, clock: Clock) -> Iterator[Sequence[VisionTimes]]:
    """While it is open, every `train_step` books its phases on ``clock``."""
    towers = [
        VisionTimes(clock, chunk.module) for chunk in parts.pipeline if chunk.module.vision_model is not None
    ]
    wanted = [(step, name, phase) for name, phase in TIMED.items()]
    if parts.tower is not None:
        wanted += [(StepViews, name, phase) for name, phase in TIMED_VIEWS.items()]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in wanted]

    def timed(function: Callable, phase: str) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with clock.phase(phase):
                return function(*args, **kwargs)

        return run

    for owner, name, phase in wanted:
        setattr(owner, name, timed(getattr(owner, name), phase))
    try:
        yield towers
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
        for tower in towers:
            tower.remove()


def split(found: dict[str, float], whole: float) -> dict[str, float]:
    """`PHASES` of a step that took ``whole`` seconds, from what a clock has booked; they add up to it."""
    seconds = dict.fromkeys(PHASES, 0.0) | {name: found.get(name, 0.0) for name in PHASES if name in found}
    inner = sum(found.get(name, 0.0) for name in INSIDE)
    seconds["decoder, head, waiting"] = found.get("forward and backward", 0.0) - inner
    seconds["other"] = whole - sum(seconds.values())
    return seconds
