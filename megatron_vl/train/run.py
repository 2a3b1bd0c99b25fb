"""A run on one rank: its live parts in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vl.checkpoint.saver import Saver
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.parallel.heartbeat import Phase, slow_seconds
from megatron_vl.train.build import Parts
from megatron_vl.train.faults import StopRequest
from megatron_vl.train.feed import Feed
from megatron_vl.train.metrics import Meter, MetricsFile


@dataclass
class Run:
    """A training run on one rank, ready to go. file: metrics of rank 0. say: prints on rank 0.

    stored: the checkpoint to continue from, None at the first start. stop: listens to nothing unless it is told to.
    """

    parts: Parts
    feed: Feed
    eval_feed: Feed | None
    meter: Meter
    file: MetricsFile | None
    say: Callable[[str], None]
    folder: Path
    phase: Phase
    total_steps: int
    saver: Saver
    stored: Stored | None
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def step_seconds(self) -> float:
        """How long a phase of a step may last without progress."""
        return self.parts.config.parallel.timeout_seconds

    @property
    def first_step_seconds(self) -> float:
        """The same where kernels are still compiled."""
        return slow_seconds(self.parts.config.parallel)

    @property
    def save_seconds(self) -> float:
        """How long the end of a save may last: the writing, then its publication."""
        return self.parts.config.checkpoint.timeout_seconds + self.step_seconds

    @property
    def newest(self) -> str:
        """Where the run can go on from, for people."""
        if self.saver.last is None:
            return "there is no checkpoint yet"
        return f"the newest checkpoint is that of step {self.saver.last.step} in {self.saver.folder}"

    def close(self) -> None:
        """End the loading processes."""
        for feed in (self.feed, self.eval_feed):
            if feed is not None:
                feed.loader.close()
