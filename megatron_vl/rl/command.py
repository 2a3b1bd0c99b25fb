"""``python -m megatron_vl rl CONFIG [--nproc N] [section.key=value ...]``: PPO on a vision-language model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_vl.config.load import LoadedRun, load_run
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import Problem
from megatron_vl.parallel.heartbeat import Phase
from megatron_vl.parallel.launch import launched, read_environment, run_local
from megatron_vl.plan.checks import check_run
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.rl_checks import check_ready_for_rl, check_rl_inputs
from megatron_vl.train.faults import StopRequest
from megatron_vl.train.pretrain import beats_folder, on_rank, parse, stop_seconds

if TYPE_CHECKING:
    from megatron_vl.parallel.runtime import Runtime


def main(argv: Sequence[str]) -> int:
    """Check the run before anything is launched, then launch the ranks or be one of them."""
    arguments = parse("rl", "Train by reinforcement learning.", argv)
    world_size = read_environment().world_size if launched() else arguments.nproc
    loaded = load(arguments.config, arguments.overrides, world_size)
    layout = Layout.from_config(loaded.config.parallel, world_size)
    if arguments.nproc > 1 and not launched():
        command = [sys.executable, "-m", "megatron_vl", "rl", *argv]
        return run_local(command, layout, beats_folder(loaded.config), stop_seconds(loaded.config))
    return reinforce(loaded, layout)


def load(path: str, overrides: Sequence[str], world_size: int) -> LoadedRun:
    """Read and check a run; raises ConfigErrors with every problem at once."""

    def checks(config: RunConfig) -> list[Problem]:
        return [*check_run(config, world_size), *check_ready_for_rl(config), *check_rl_inputs(config)]

    return load_run(path, overrides, None, checks)


def reinforce(loaded: LoadedRun, layout: Layout) -> int:
    """Be one rank of the run: build, resume if there is something to resume, train. Returns the exit code."""

    def work(runtime: Runtime, phase: Phase, stop: StopRequest) -> None:
        from megatron_vl.rl.loop import resume, train
        from megatron_vl.rl.run import prepare

        run = prepare(loaded, runtime, phase)
        run.stop = stop
        try:
            done = train(run, resume(run))
        finally:
            run.close()
        if not stop.agreed:
            run.say(f"done: {done.step} iterations, {done.tokens:,} tokens; everything is in {run.folder}")

    return on_rank(loaded.config, layout, work)
