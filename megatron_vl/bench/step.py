"""`benchmark_throughput.py step`: training steps of any run description, in any layout, timed part by part.

The ranks are started, watched and built as by `python -m megatron_vl pretrain`, and take the trainer's own steps; only
checkpoints and evaluation are left out. Data are the run's own, or made up where it names none.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from megatron_vl.config.load import LoadedRun
from megatron_vl.config.schema import RunConfig
from megatron_vl.parallel.launch import launched, read_environment, run_local
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.layout import Layout
from megatron_vl.train.pretrain import beats_folder, on_rank, stop_seconds

HELP = "whole training steps of a run description: CONFIG [section.key=value ...]"
Outcome = tuple[str, dict[str, Any], bool]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for pretrain")
    parser.add_argument("--nproc", type=int, default=1, help="start this many local ranks (default 1)")
    parser.add_argument("--steps", type=int, default=10, help="steps that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before (default: %(default)s)")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace of one more step of rank 0")
    parser.add_argument("--synthetic", action="store_true", help="made-up data although the run has its own")
    parser.add_argument(
        "--visual-share", type=float, help="part of the made-up tokens that is visual (default: 0.3, less text_share)"
    )  # fmt: skip
    parser.add_argument("--document-tokens", type=int, help="length of the made-up documents of packed rows")
    parser.add_argument(
        "--fake-world", type=int, metavar="N",
        help="be one rank of N of which the others do not exist: its compute time and memory, no communication",
    )  # fmt: skip
    parser.add_argument(
        "--fake-rank", type=int, default=0, metavar="R", help="which one (default: %(default)s)"
    )
    parser.add_argument(
        "--against-plain", action="store_true", help="in turns with the same model in plain PyTorch, one CPU rank"
    )  # fmt: skip


def run(options: argparse.Namespace) -> Outcome:
    """The report, the same as a record, and whether every step's loss was finite. Only rank 0 has a report."""
    loaded, own_data = described(options)
    config = loaded.config
    if options.against_plain:
        from megatron_vl.bench.against_plain import compare

        return compare(loaded, options)
    if options.fake_world:
        return _alone(loaded, options)
    world_size = read_environment().world_size if launched() else options.nproc
    layout = Layout.from_config(config.parallel, world_size)
    if options.nproc > 1 and not launched():
        code = run_local(options.again, layout, beats_folder(config), stop_seconds(config))
        return "", {}, code == 0
    outcome: list[Outcome] = []

    def work(runtime, phase, stop) -> None:
        from megatron_vl.bench.step_rank import measure

        outcome.append(measure(loaded, own_data, runtime, phase, options))

    on_rank(config, layout, work)
    return outcome[0]


def described(options: argparse.Namespace) -> tuple[LoadedRun, bool]:
    """The run as it is benchmarked, and whether it reads data of its own.

    Raises ConfigErrors: the layout is illegal, or data that the run names are not there.
    """
    world_size = options.fake_world or (read_environment().world_size if launched() else options.nproc)
    loaded = load_checked_run(options.config, options.overrides, None, world_size)
    data = loaded.config.data
    own_data = bool(data.train or data.domains) and not options.synthetic
    if own_data:
        loaded = load_checked_run(options.config, options.overrides, None, world_size, to_train=True)
    return replace(loaded, config=benchmarked(loaded.config, options.warmup + options.steps)), own_data


def benchmarked(config: RunConfig, steps: int) -> RunConfig:
    """The description with as many steps as are run, without evaluation, and in a folder of its own below the run's:
    nothing of the run is resumed or overwritten."""
    train = replace(config.train, train_steps=steps, eval_interval=0, exit_duration_minutes=None)
    return replace(config, train=train, run_dir=f"{config.run_dir}/benchmark")


def _alone(loaded: LoadedRun, options: argparse.Namespace) -> Outcome:
    from megatron_vl.bench.step_rank import measure
    from megatron_vl.parallel.fake import fake_ranks
    from megatron_vl.parallel.heartbeat import Phase

    config = loaded.config
    with fake_ranks(config.parallel, config.train.seed, options.fake_rank, options.fake_world) as runtime:
        return measure(loaded, False, runtime, Phase("measuring"), options)
