"""Steps whose loss or gradient is not finite: counted, written down, and the end of a run that makes only such."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_vl.checkpoint.progress import Progress
from megatron_vl.data.batch import MicroBatch
from megatron_vl.errors import MegatronVLError
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.train.metrics import StepLines
from megatron_vl.train.step import StepResult

SHOWN = 16  # samples of a step that the error lists


class TooManySkippedSteps(MegatronVLError):
    """Loss or gradient was not finite for more steps in a row than the run allows."""


class SkippedSteps:
    """The steps in a row that were skipped up to now, alike on every rank; rank 0 writes skipped_steps.jsonl."""

    def __init__(self, folder: Path, limit: int, runtime: Runtime, say: Callable[[str], None]) -> None:
        self.path, self.limit, self.runtime, self.say = folder / "skipped_steps.jsonl", limit, runtime, say
        self.in_a_row: list[tuple[int, list[str]]] = []

    def see(self, progress: Progress, result: StepResult, batches: Sequence[MicroBatch]) -> None:
        """Take note of the step that ``progress`` includes; every rank calls it after every step."""
        if not result.skipped:
            self.in_a_row.clear()
            return
        samples = self._samples(batches)
        self.in_a_row.append((progress.step, samples))
        loss, norm = as_text(result.loss), as_text(result.grad_norm)
        if self.runtime.rank == 0:
            record = {"step": progress.step, "tokens": progress.tokens, "loss": loss, "grad_norm": norm}
            StepLines(self.path, progress.step - 1).write({**record, "samples": samples})
        self.say(
            f"step {progress.step} skipped: loss {loss}, gradient norm {norm}; {len(self.in_a_row)} in a row (at "
            f"most {self.limit}), {progress.skipped} in all; its samples are in {self.path}"
        )

    @property
    def too_many(self) -> bool:
        return len(self.in_a_row) > self.limit

    def error(self, newest: str) -> TooManySkippedSteps:
        """What ends the run. newest: the checkpoint that it can go on from, for people."""
        steps = "\n".join(f"  step {step}: {_shortened(samples)}" for step, samples in self.in_a_row)
        return TooManySkippedSteps(
            f"{len(self.in_a_row)} steps in a row had a loss or gradient that is not finite, "
            f"train.max_skipped_steps = {self.limit}. The weights were not changed by them; {newest}. If other "
            "samples fail in the same way, the weights diverged before: lower the learning rate (schedule.phases) or "
            "optim.clip_grad and go back to an older checkpoint; if these alone do, remove them. All samples are in "
            f"{self.path}:\n{steps}"
        )

    def _samples(self, batches: Sequence[MicroBatch]) -> list[str]:
        """Ids of the whole global batch, without filler."""
        mine = [name for batch in batches for name in batch.sample_ids if name]
        everyone: list[list[str]] = [[] for _ in range(self.runtime.layout.dp)]
        dist.all_gather_object(everyone, mine, group=self.runtime.groups.dp)
        return [name for rank in everyone for name in rank]


def as_text(value: float) -> float | str:
    """The number, or its name where JSON has none: nan, inf, -inf."""
    return value if math.isfinite(value) else str(value)


def _shortened(samples: Sequence[str]) -> str:
    more = len(samples) - SHOWN
    return ", ".join(samples[:SHOWN]) + (f" and {more} more" if more > 0 else "")
