"""The training loop: load, step, log, save, evaluate. Reads top to bottom; between steps see `boundary.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from megatron_vl.checkpoint.progress import Progress
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.batch import MicroBatch
from megatron_vl.data.training import is_planned
from megatron_vl.errors import DataError
from megatron_vl.optim.schedule import learning_rate
from megatron_vl.plan.budget import tokens_per_step
from megatron_vl.train.boundary import begin_save, evaluation_is_missing, finish_save, next_batches, stop
from megatron_vl.train.console import step_line
from megatron_vl.train.run import Run
from megatron_vl.train.skipped import SkippedSteps
from megatron_vl.train.step import StepResult, evaluate_loss, train_step


def train(run: Run, progress: Progress) -> Progress:
    """Train from ``progress`` to the end of the run, or until the ranks have agreed to stop (``run.stop.agreed``).

    Returns where it ended; that is saved, unless ``checkpoint.save_at_end`` says otherwise.

    Raises:
        TooManySkippedSteps: more than ``train.max_skipped_steps`` in a row.
    """
    config, parts = run.parts.config, run.parts
    skips = SkippedSteps(run.folder, config.train.max_skipped_steps, parts.runtime, run.say)
    limit, save_due = run.first_step_seconds, False
    run.stop.defer()
    if evaluation_is_missing(run, progress.step) and evaluate(run, progress.step) is None:
        return stop(run, progress, skips)
    while progress.step < run.total_steps:
        begin = time.perf_counter()
        batches = next_batches(run, run.feed, "loading data", progress.step + 1)
        if batches is None:
            return stop(run, progress, skips)
        lr = learning_rate(config.schedule, progress.tokens)
        run.phase.enter("training", limit=limit)
        limit = run.step_seconds
        result = train_step(parts, batches, lr, run.phase.tick)
        if result.tokens == 0:
            raise nothing_scored(run, progress.step + 1)
        progress = after_step(progress, config, result)
        report(run, progress, lr, result, batches, time.perf_counter() - begin)
        skips.see(progress, result, batches)
        if skips.too_many:
            finish_save(run)
            raise skips.error(run.newest)
        at_end = progress.step == run.total_steps
        save_due |= due(progress.step, config.checkpoint.save_interval)
        # weights that have just met a loss that is not finite are not saved before a good step, but at the end
        if (save_due and not skips.in_a_row) or (at_end and config.checkpoint.save_at_end):
            begin_save(run, progress)
            save_due = False
        eval_due = run.eval_feed is not None and (at_end or due(progress.step, config.train.eval_interval))
        if eval_due and evaluate(run, progress.step) is None:
            return stop(run, progress, skips)
    finish_save(run)
    return progress


def due(step: int, interval: int) -> bool:
    """Whether ``step`` ends an interval; 0 = there are none."""
    return interval > 0 and step % interval == 0


def after_step(progress: Progress, config: RunConfig, result: StepResult) -> Progress:
    """One step further; the data of a skipped one count as consumed."""
    return replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + tokens_per_step(config),
        samples=progress.samples + config.train.global_batch_size,
        skipped=progress.skipped + result.skipped,
    )


def report(
    run: Run, progress: Progress, lr: float, result: StepResult, batches: Sequence[MicroBatch], seconds: float
) -> None:
    """Metrics of a step, to the file and the console. seconds: of the whole step."""
    run.phase.enter("measuring", limit=run.step_seconds)
    loader, config = run.feed.loader, run.parts.config
    metrics = run.meter.measure(
        progress.step, progress.tokens, lr, result, batches, seconds, loader.wait_seconds, run.feed.log.total,
        progress.skipped,
    )  # fmt: skip
    if run.file:
        run.file.write(metrics)
    if progress.step % config.train.log_interval == 0 or progress.step == run.total_steps:
        on_cpu = run.parts.runtime.device.type == "cpu"
        run.say(step_line(metrics, run.total_steps, on_cpu, is_planned(config.data)))


def nothing_scored(run: Run, step: int) -> DataError:
    """The error of a step without a single scored token."""
    return DataError(
        f"step {step}: none of its {run.parts.config.train.global_batch_size} samples has a scored token; "
        f"{run.feed.log.summary()}, see {run.folder / 'bad_samples.jsonl'} and data.data_root"
    )


def evaluate(run: Run, step: int) -> float | None:
    """Mean loss over the evaluation set, every sample once; printed and written to the metrics.

    None when the ranks have agreed to stop before its end; nothing is written then.
    """
    feed = run.eval_feed
    feed.loader.seek(0)
    total = tokens = 0.0
    for number in range(feed.loader.num_steps):
        batches = next_batches(run, feed, "loading evaluation data", step)
        if batches is None:
            run.say(f"eval at step {step} abandoned after {number} of {feed.loader.num_steps} batches")
            return None
        run.phase.enter("evaluating", limit=run.first_step_seconds if number == 0 else run.step_seconds)
        loss, count = evaluate_loss(run.parts, batches, run.phase.tick)
        total, tokens = total + loss * count, tokens + count
    loss = total / max(tokens, 1)
    refused = f" | {feed.log.summary()}" if feed.log.total else ""
    run.say(f"eval at step {step} | loss {loss:.4f} over {int(tokens)} tokens{refused}")
    if run.file:
        run.file.write({"step": step, "eval_loss": loss, "eval_tokens": int(tokens)})
    return loss
