"""Between two steps: data are loaded, and the ranks agree whether to stop and whether to publish a save."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_vl.checkpoint.folder import name_of
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.data.batch import MicroBatch
from megatron_vl.train.faults import NOTHING_TO_SAVE
from megatron_vl.train.feed import Feed
from megatron_vl.train.run import Run
from megatron_vl.train.skipped import SkippedSteps


def next_batches(run: Run, feed: Feed, loading: str, step: int) -> list[MicroBatch] | None:
    """The micro-batches of the next step, or None on every rank when any has been asked to stop.

    A request ends the wait for data. A save that all ranks have written is published on the way. loading: the name
    of the phase.
    """
    run.phase.enter(loading, step, run.step_seconds)
    loaded = run.stop.wait_for(lambda: feed.loader.next_step(run.phase.tick))
    run.phase.enter(f"{loading}, here done", limit=run.step_seconds)
    run.stop.agreed, writing = agree(run, run.stop.number, run.saver.pending and not run.saver.ready)
    if run.saver.pending and not writing:
        run.phase.enter("publishing a checkpoint", limit=run.save_seconds)
        run.saver.commit()
    if run.stop.agreed:
        return None
    assert loaded is not None, "data are only abandoned on a request, and one request stops all ranks"
    run.phase.enter(f"{loading}, here done", limit=run.step_seconds)
    return feed.settle(loaded)


def agree(run: Run, *values: int) -> list[int]:
    """The largest of each value over all ranks."""
    state = torch.tensor(values, dtype=torch.int64, device=run.parts.runtime.device)
    dist.all_reduce(state, op=dist.ReduceOp.MAX)
    return state.tolist()


def begin_save(run: Run, progress: Progress) -> None:
    """Copy what is to be saved; it is written while training goes on."""
    run.phase.enter("saving", limit=run.save_seconds)
    run.saver.begin(progress)


def finish_save(run: Run) -> None:
    """Wait for the save in flight, if there is one, and publish it."""
    run.phase.enter("saving", limit=run.save_seconds)
    run.saver.finish()


def stop(run: Run, progress: Progress, skips: SkippedSteps) -> Progress:
    """All ranks have agreed to stop after ``progress``: save it unless that has been done, and say where.

    In the midst of skipped steps nothing new is saved: whether the weights are good is not known then.
    """
    saved = run.saver.last is not None and run.saver.last.step == progress.step
    if progress.step and not saved and not skips.in_a_row:
        begin_save(run, progress)
    finish_save(run)
    why = f"stopped on {run.stop.reason(run.stop.agreed)}"
    again = "start the same command again to continue"
    if run.saver.last is None and not progress.step:
        run.say(f"{why} {NOTHING_TO_SAVE}")
    elif run.saver.last is None or run.saver.last.step != progress.step:
        steps = len(skips.in_a_row)
        run.say(
            f"{why} at step {progress.step}, after {steps} skipped steps: not saved; {run.newest}; {again}"
        )
    else:
        run.say(f"{why} at step {progress.step}; saved {run.saver.folder / name_of(progress.step)}; {again}")
    return progress


def evaluation_is_missing(run: Run, step: int) -> bool:
    """Whether the evaluation after ``step`` was due and a stop or a kill has prevented it; equal on every rank."""
    interval = run.parts.config.train.eval_interval
    if run.eval_feed is None or not step or (step % interval and step != run.total_steps):
        return False
    missing = run.file is not None and not run.file.has_evaluation(step)
    return bool(agree(run, missing)[0])
