"""``python -m megatron_vl rl CONFIG [--nproc N] [section.key=value ...]``: PPO on a vision-language model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_vl.config.load import LoadedRun, load_run
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import Problem
from megatron_vl.parallel.heartbeat import Heartbeat, Phase, slow_seconds
from megatron_vl.parallel.launch import STOPPED, launched, read_environment, run_local
from megatron_vl.plan.checks import check_run
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.rl_checks import check_ready_for_rl, check_rl_inputs
from megatron_vl.train.faults import StopRequest
from megatron_vl.train.pretrain import beats_folder, stop_seconds


def main(argv: Sequence[str]) -> int:
    """Check the run before anything is launched, then launch the ranks or be one of them."""
    arguments = parse(argv)
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of ``rl``."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vl rl", description="Train by reinforcement learning."
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace the file's"
    )
    parser.add_argument("--nproc", type=int, default=1, help="start this many local ranks (default 1)")
    return parser.parse_intermixed_args(list(argv))


def reinforce(loaded: LoadedRun, layout: Layout) -> int:
    """Be one rank of the run. Returns the exit code: 0 at its end, 75 when it was stopped and may be started again."""
    config, rank = loaded.config, read_environment().rank
    stop, phase = StopRequest(), Phase("importing libraries")
    stop.listen(config.train.exit_duration_minutes, speaks=rank == 0)
    with Heartbeat(beats_folder(config), layout, rank, phase, slow_seconds(config.parallel)) as heartbeat:
        from megatron_vl.parallel.runtime import reported, start_from_environment
        from megatron_vl.rl.loop import resume, train
        from megatron_vl.rl.run import prepare

        phase.enter("joining the other ranks")
        with start_from_environment(config.parallel, config.train.seed) as runtime:
            with reported(runtime, phase, heartbeat):
                run = prepare(loaded, runtime, phase)
                run.stop = stop
                try:
                    done = train(run, resume(run))
                finally:
                    run.close()
                    stop.ignore()
                phase.enter("leaving", limit=run.step_seconds)
            if not stop.agreed:
                run.say(
                    f"done: {done.step} iterations, {done.tokens:,} tokens; everything is in {run.folder}"
                )
    return STOPPED if stop.agreed else 0
