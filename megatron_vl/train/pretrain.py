"""``python -m megatron_vl pretrain CONFIG [--nproc N] [section.key=value ...]``: pre-training, start to end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.config.load import LoadedRun
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import Problem
from megatron_vl.parallel.heartbeat import Heartbeat, Phase, slow_seconds
from megatron_vl.parallel.launch import STOPPED, launched, read_environment, run_local
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.layout import Layout
from megatron_vl.train.faults import StopRequest

if TYPE_CHECKING:
    from megatron_vl.parallel.runtime import Runtime


def main(argv: Sequence[str]) -> int:
    """``pretrain`` from the command line."""
    return start("pretrain", "Pre-train a model.", argv)


def start(
    command: str,
    description: str,
    argv: Sequence[str],
    checks: Callable[[RunConfig], list[Problem]] | None = None,
) -> int:
    """Check the run before anything is launched, then launch the ranks or be one of them.

    command: of ``python -m megatron_vl``, which the ranks run too. checks: what this stage asks beyond
    ``plan.checks.check_ready_to_train``. Returns the exit code.
    """
    arguments = parse(command, description, argv)
    world_size = read_environment().world_size if launched() else arguments.nproc
    loaded = load_checked_run(arguments.config, arguments.overrides, None, world_size, True, checks)
    config = loaded.config
    layout = Layout.from_config(config.parallel, world_size)
    if arguments.nproc > 1 and not launched():
        ranks = [sys.executable, "-m", "megatron_vl", command, *argv]
        return run_local(ranks, layout, beats_folder(config), stop_seconds(config))
    return train_on_rank(loaded, layout)


def parse(command: str, description: str, argv: Sequence[str]) -> argparse.Namespace:
    """The command line of a training stage."""
    parser = argparse.ArgumentParser(prog=f"python -m megatron_vl {command}", description=description)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace the file's"
    )
    parser.add_argument("--nproc", type=int, default=1, help="start this many local ranks (default 1)")
    return parser.parse_intermixed_args(list(argv))


def beats_folder(config: RunConfig) -> Path:
    """Where the ranks say what they are doing."""
    return Path(config.run_dir) / "ranks"


def stop_seconds(config: RunConfig) -> float:
    """How long the launcher waits for a run that it has asked to stop: a step, a save, and the end."""
    return config.checkpoint.timeout_seconds + 2 * config.parallel.timeout_seconds


def train_on_rank(loaded: LoadedRun, layout: Layout) -> int:
    """Be one rank of the run: build, resume if there is something to resume, train. Returns the exit code."""

    def work(runtime: Runtime, phase: Phase, stop: StopRequest) -> None:
        from megatron_vl.train.loop import train
        from megatron_vl.train.prepare import prepare, resume

        run = prepare(loaded, runtime, phase)
        run.stop = stop
        try:
            done = train(run, resume(run))
        finally:
            run.close()
        if not stop.agreed:
            run.say(f"done: {done.step} steps, {done.tokens:,} tokens; everything is in {run.folder}")

    return on_rank(loaded.config, layout, work)


def on_rank(config: RunConfig, layout: Layout, work: Callable[[Runtime, Phase, StopRequest], None]) -> int:
    """Be one rank of a run that can be stopped and watched: signals, heartbeat, groups, then ``work``.

    work: sets ``agreed`` of its request when the ranks have agreed to stop. Returns the exit code: 0 at the end of the
    run, 75 when it was stopped and may be started again.
    """
    rank = read_environment().rank
    stop, phase = StopRequest(), Phase("importing libraries")
    stop.listen(config.train.exit_duration_minutes, speaks=rank == 0)
    slow = slow_seconds(config.parallel)
    with Heartbeat(beats_folder(config), layout, rank, phase, slow) as heartbeat:
        import megatron_vl.train.prepare  # noqa: F401  takes seconds: before anybody waits for this rank
        from megatron_vl.parallel.runtime import reported, start_from_environment

        phase.enter("joining the other ranks")
        with (
            start_from_environment(config.parallel, config.train.seed) as runtime,
            reported(runtime, phase, heartbeat),
        ):
            try:
                work(runtime, phase, stop)
            finally:
                stop.ignore()
            phase.enter("leaving", limit=config.parallel.timeout_seconds)
    return STOPPED if stop.agreed else 0
