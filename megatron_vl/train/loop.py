"""The training loop: load, step, log, evaluate, save. Reads top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.checkpoint.saved import Progress, save
from megatron_vl.errors import DataError
from megatron_vl.optim.schedule import learning_rate
from megatron_vl.parallel.runtime import Phase
from megatron_vl.plan.budget import tokens_per_step
from megatron_vl.train.build import Parts
from megatron_vl.train.console import step_line
from megatron_vl.train.feed import Feed
from megatron_vl.train.metrics import Meter, MetricsFile
from megatron_vl.train.step import evaluate_loss, train_step


@dataclass
class Run:
    """A training run on one rank, ready to go. file: metrics of rank 0. say: prints on rank 0."""

    parts: Parts
    feed: Feed
    eval_feed: Feed | None
    meter: Meter
    file: MetricsFile | None
    say: Callable[[str], None]
    folder: Path
    phase: Phase
    total_steps: int

    def close(self) -> None:
        """End the loading processes."""
        for feed in (self.feed, self.eval_feed):
            if feed is not None:
                feed.loader.close()


def train(run: Run, progress: Progress) -> Progress:
    """Train from ``progress`` to the end of the run; returns where it ended."""
    config, parts = run.parts.config, run.parts
    on_cpu = parts.runtime.device.type == "cpu"
    step, tokens = progress.step, progress.tokens
    while step < run.total_steps:
        run.phase.step = step + 1
        begin = time.perf_counter()
        run.phase.name = "loading data"
        batches = run.feed.next_step()
        lr = learning_rate(config.schedule, tokens)
        run.phase.name = "training"
        result = train_step(parts, batches, lr)
        if result.tokens == 0:
            raise DataError(
                f"step {step + 1}: none of its {config.train.global_batch_size} samples has a scored token; "
                f"{run.feed.log.summary()}, see {run.folder / 'bad_samples.jsonl'} and data.data_root"
            )
        step, tokens = step + 1, tokens + tokens_per_step(config)
        seconds = time.perf_counter() - begin
        metrics = run.meter.measure(
            step, tokens, lr, result, batches, seconds, run.feed.loader.wait_seconds, run.feed.log.total
        )
        if run.file:
            run.file.write(metrics)
        if step % config.train.log_interval == 0 or step == run.total_steps:
            run.say(step_line(metrics, run.total_steps, on_cpu))
        if _due(step, config.train.eval_interval, run.total_steps) and run.eval_feed is not None:
            run.phase.name = "evaluating"
            evaluate(run, step)
        at_end = step == run.total_steps and config.checkpoint.save_at_end
        every = config.checkpoint.save_interval
        if at_end or (every and step % every == 0):
            run.phase.name = "saving"
            save_now(run, Progress(step, tokens, progress.data))
    return Progress(step, tokens, progress.data)


def _due(step: int, interval: int, last: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == last)


def evaluate(run: Run, step: int) -> float:
    """Mean loss over the evaluation set, every sample once; printed and written to the metrics."""
    run.eval_feed.loader.seek(0)
    total = tokens = 0.0
    for _ in range(run.eval_feed.loader.num_steps):
        loss, count = evaluate_loss(run.parts, run.eval_feed.next_step())
        total, tokens = total + loss * count, tokens + count
    loss = total / max(tokens, 1)
    refused = f" | {run.eval_feed.log.summary()}" if run.eval_feed.log.total else ""
    run.say(f"eval at step {step} | loss {loss:.4f} over {int(tokens)} tokens{refused}")
    if run.file:
        run.file.write({"step": step, "eval_loss": loss, "eval_tokens": int(tokens)})
    return loss


def save_now(run: Run, progress: Progress) -> None:
    """Save and say where."""
    begin = time.perf_counter()
    where = save(
        run.folder / "checkpoints", progress, run.parts.runtime, run.parts.chunks, run.parts.optimizer
    )
    run.say(f"saved {where} in {time.perf_counter() - begin:.1f} s")
