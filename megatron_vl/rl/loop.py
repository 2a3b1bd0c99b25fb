"""The loop: draw, verify, learn, save; resumed anywhere, also inside an iteration."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vl.checkpoint.folder import name_of
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.checkpoint.resume import restore
from megatron_vl.config.changes import changed_keys
from megatron_vl.errors import CheckpointError
from megatron_vl.rl.collect import Collected, collect, stop_is_agreed
from megatron_vl.rl.journal import retire
from megatron_vl.rl.learn import Learnt, learn
from megatron_vl.rl.prompt_set import RlPrompt
from megatron_vl.rl.report import (
    iteration_line,
    learning_metrics,
    reward_metrics,
    write_page,
    write_rollouts,
)
from megatron_vl.rl.run import RlRun
from megatron_vl.train.faults import NOTHING_TO_SAVE
from megatron_vl.train.loop import due
from megatron_vl.train.metrics import MetricsFile, memory_in_use
from megatron_vl.train.prepare import resolved

EVALUATION = 1_000_000_000  # its seeds are those of no iteration, and the same each time


@dataclass
class Clock:
    """Seconds of each phase of an iteration."""

    seconds: dict[str, float]
    last: float

    @classmethod
    def start(cls) -> Clock:
        return cls({}, time.perf_counter())

    def lap(self, name: str) -> None:
        """What has passed since the last lap belongs to ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def train(run: RlRun, progress: Progress) -> Progress:
    """From ``progress`` to the last iteration, or until the ranks have agreed to stop. Returns where it ended.

    Progress counts iterations as steps and response tokens as tokens.
    """
    rl = run.config.rl
    run.stop.defer()
    if progress.step == 0 and rl.eval_interval and not evaluate(run, 0):
        return stop(run, progress)
    while progress.step < rl.iterations:
        if stop_is_agreed(run):
            return stop(run, progress)
        times = Clock.start()
        prompts = read_prompts(run, progress.step)
        collected = collect(
            run,
            prompts,
            rl.rollout.samples_per_prompt,
            progress.step,
            run.folder / "journal",
            run.config.train.seed,
            times.lap,
        )
        if collected is None:
            return stop(run, progress)
        run.phase.enter("learning", progress.step + 1, run.step_seconds)
        learnt = learn(
            run.models,
            [s.trajectory for s in collected.scored],
            progress.step,
            collected.version,
            run.features_of,
            run.phase.tick,
        )
        times.lap("learn")
        progress = replace(
            progress,
            step=progress.step + 1,
            tokens=progress.tokens + sum(len(s.response.tokens) for s in collected.scored),
            samples=progress.samples + len(collected.scored),
            skipped=progress.skipped + sum(update.skipped for update in learnt.actor),
        )
        report(run, progress, collected, learnt, times)
        at_end = progress.step == rl.iterations
        if due(progress.step, run.config.checkpoint.save_interval) or (
            at_end and run.config.checkpoint.save_at_end
        ):
            save(run, progress)
        if (
            rl.eval_interval
            and (at_end or due(progress.step, rl.eval_interval))
            and not evaluate(run, progress.step)
        ):
            return stop(run, progress)
    return progress


def read_prompts(run: RlRun, iteration: int) -> list[RlPrompt]:
    """The prompts of an iteration; refused ones are counted and written to bad_samples.jsonl."""
    run.phase.enter("reading prompts", iteration + 1, run.step_seconds)
    count = run.config.rl.rollout.prompts_per_iteration
    prompts, refused = run.prompts.of_iteration(iteration, count, run.config.data.seed)
    run.refused.add(refused)
    return prompts


def report(run: RlRun, progress: Progress, collected: Collected, learnt: Learnt, times: Clock) -> None:
    """Metrics to the file and the console, every rollout to disk; rank 0."""
    run.phase.enter("reporting", progress.step, run.step_seconds)
    if run.runtime.rank:
        return
    iteration, rl = progress.step - 1, run.config.rl
    write_rollouts(run.folder / "rollouts", iteration, collected, learnt.advantages)
    if rl.page_prompts:
        rule = run.prompts.builder.images.decode_rule
        write_page(run.folder / "rollouts", iteration, collected, learnt.advantages, rl.page_prompts, rule)
    times.lap("report")
    seconds = sum(times.seconds.values())
    store = run.store.counts
    metrics = {
        "step": progress.step,
        "tokens": progress.tokens,
        **reward_metrics(collected.scored, rl.rewards.accept_at),
        **learning_metrics(learnt),
        **{f"seconds/{name}": value for name, value in times.seconds.items()},
        "seconds/iteration": seconds,
        "tokens_per_second_per_gpu": sum(len(s.response.tokens) for s in collected.scored)
        / seconds
        / run.runtime.layout.world_size,
        "features/found": store.found,
        "features/computed": store.computed,
        "features/damaged": store.damaged,
        "journal/resumed": collected.resumed,
        "journal/damaged": collected.damaged,
        "prompts/refused": run.refused.total,
        "weight_version": collected.version,
        "memory_bytes": memory_in_use(run.runtime.device),
    }
    run.file.write(metrics)
    eta = (rl.iterations - progress.step) * seconds
    run.say(iteration_line(metrics, rl.iterations, eta))
    for alarm in learnt.alarms:
        run.say(f"ALARM iteration {progress.step}: {alarm}")


def evaluate(run: RlRun, step: int) -> bool:
    """Rewards of the held-out prompts, sampled as in training; False when the ranks have agreed to stop."""
    run.phase.enter("reading held-out prompts", step, run.step_seconds)
    prompts, refused = run.eval_prompts.read(range(len(run.eval_prompts)))
    run.refused.add(refused)
    folder = run.folder / "evaluation" / f"step_{step:06d}"
    rl = run.config.rl
    collected = collect(run, prompts, rl.eval_samples, EVALUATION, folder, run.config.train.seed)
    if collected is None:
        return False
    if run.runtime.rank == 0:
        found = reward_metrics(collected.scored, rl.rewards.accept_at)
        run.file.write({"step": step, **{f"eval/{name}": value for name, value in found.items()}})
        write_rollouts(folder, step, collected, {})
        run.say(
            f"eval at iteration {step} | reward {found['reward/mean']:.4f} | accuracy "
            f"{100 * found['reward/accuracy']:.1f}% over {len(collected.scored)} responses to {len(prompts)} prompts"
        )
    return True


def save(run: RlRun, progress: Progress) -> None:
    """Actor and critic in one checkpoint, so that they are always of one moment; then old journals may go."""
    run.phase.enter("saving", limit=run.config.checkpoint.timeout_seconds + run.step_seconds)
    run.models.turns.all_here()
    run.saver.begin(progress)
    run.saver.finish()
    if run.runtime.rank == 0:
        retire(run.folder / "journal", progress.step - 1, run.config.rl.keep_journal)


def stop(run: RlRun, progress: Progress) -> Progress:
    """The ranks have agreed to stop: save what is done, say where. What was drawn of an iteration is in its journal."""
    why = f"stopped on {run.stop.reason(run.stop.agreed)}"
    if not progress.step:
        run.say(f"{why} {NOTHING_TO_SAVE}")
        return progress
    if run.saver.last is None or run.saver.last.step != progress.step:
        save(run, progress)
    where = run.saver.folder / name_of(progress.step)
    run.say(f"{why} after iteration {progress.step}; saved {where}; start the same command again to continue")
    return progress


def resume(run: RlRun) -> Progress:
    """Continue from the newest checkpoint of the run folder, or start at iteration 0.

    Raises:
        CheckpointError: the prompts, or which come when, are not those of the run that the checkpoint is of.
    """
    run.phase.enter("resuming")
    data = prompt_order(run)
    progress = Progress(0, 0, data)
    if run.stored is not None:
        run.models.turns.all_here()
        progress = restore(run.stored, run.saver.live, run.config.train.seed, run.say)
        if progress.data != data:
            raise CheckpointError(
                f"{run.stored.folder} was trained on {progress.data}; it is now {data}: other prompts would come; use "
                "another run_dir, or the same rl.prompts, data.seed and rl.rollout.prompts_per_iteration"
            )
        run.saver.last = progress
        for change in changed_keys(run.stored.config, resolved(run.config, run.models.actor)):
            run.say(f"changed since the checkpoint was saved: {change}")
        run.say(f"resumed from {run.stored.folder}: iteration {progress.step}")
    if run.runtime.rank == 0:
        run.file = MetricsFile(run.folder / "metrics.jsonl", progress.step)
    sys.stdout.flush()
    return progress


def prompt_order(run: RlRun) -> str:
    """What decides which prompts an iteration has."""
    files = json.dumps(
        [[Path(f["path"]).name, f["samples"], f["bytes"]] for f in run.prompts.lines.describe()]
    )
    rollout = run.config.rl.rollout
    return (
        f"{files} with seed {run.config.data.seed} and {rollout.prompts_per_iteration} prompts an iteration"
    )
