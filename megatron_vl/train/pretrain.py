"""``python -m megatron_vl pretrain CONFIG [--nproc N] [section.key=value ...]``: pre-training, start to end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_vl.config.load import LoadedRun
from megatron_vl.parallel.launch import launched, run_local
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.layout import Layout


def main(argv: Sequence[str]) -> int:
    """Check the run before anything is launched, then launch the ranks or be one of them."""
    arguments = parse(argv)
    if launched():
        from megatron_vl.parallel.runtime import read_environment

        world_size = read_environment().world_size
    else:
        world_size = arguments.nproc
    loaded = load_checked_run(arguments.config, arguments.overrides, None, world_size, to_train=True)
    if arguments.nproc > 1 and not launched():
        layout = Layout.from_config(loaded.config.parallel, world_size)
        return run_local([sys.executable, "-m", "megatron_vl", "pretrain", *argv], layout)
    pretrain(loaded)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of ``pretrain``."""
    parser = argparse.ArgumentParser(prog="python -m megatron_vl pretrain", description="Pre-train a model.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace the file's"
    )
    parser.add_argument("--nproc", type=int, default=1, help="start this many local ranks (default 1)")
    return parser.parse_intermixed_args(list(argv))


def pretrain(loaded: LoadedRun) -> None:
    """Be one rank of the run: start, build, resume if there is something to resume, train, stop."""
    from megatron_vl.parallel.runtime import Phase, reported, start_from_environment
    from megatron_vl.train.loop import train
    from megatron_vl.train.prepare import prepare, resume

    config = loaded.config
    with start_from_environment(config.parallel, config.train.seed) as runtime:
        phase = Phase()
        with reported(runtime, phase):
            run = prepare(loaded, runtime, phase)
            progress = resume(run)
            done = train(run, progress)
            run.close()
        run.say(f"done: {done.step} steps, {done.tokens:,} tokens; everything is in {run.folder}")
