"""The `plan` command: memory and step time of one layout; and what `tools/plan_parallelism.py` is asked."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_vl.config.load import load_run
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError, ConfigErrors, Problem, raise_if_any
from megatron_vl.plan.budget import num_microbatches
from megatron_vl.plan.candidates import Candidate
from megatron_vl.plan.checks import check_run, load_checked_run
from megatron_vl.plan.command import split_items
from megatron_vl.plan.devices import DEVICES, GIB, device_of, measured_values, why_not
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.model_checks import check_model
from megatron_vl.plan.plan_lines import figure_lines, question_lines, verdict_lines
from megatron_vl.plan.rank_state import chosen_ranks
from megatron_vl.plan.search import SHOWN, Answer, Planner, Question

DryRun = Callable[[Question, Candidate, Sequence[int]], int]


def main(argv: Sequence[str], dry_run: DryRun) -> int:
    """Checks one layout. Returns 0, or 1 when it does not fit. Raises ConfigErrors when it is not legal.

    dry_run: builds the ranks of `--rank` instead, and returns the exit code; it lives above this room.
    """
    options = parser(
        "python -m megatron_vl plan", "Predict the memory and the step time of a run's layout; start nothing."
    )
    options.add_argument(
        "--rank", metavar="R", help="build this rank without memory and compare: 17, 0,511,1023 or sample:22"
    )
    arguments = options.parse_intermixed_args(argv)
    path, overrides = source(arguments)
    world = arguments.gpus
    if world is None:
        world = load_run(path, overrides, arguments.hf).config.parallel.model_parallel_size
    config = load_checked_run(path, overrides, arguments.hf, world).config
    planner = Planner(question(arguments, config, world))
    if arguments.rank is not None:
        ranks = chosen_ranks(arguments.rank, world)
        print("\n".join([*calibration_lines(arguments), *question_lines(planner.question)]))
        return dry_run(planner.question, candidate_of(config, world), ranks)
    verdict = planner.judge(candidate_of(config, world))
    told = [
        *calibration_lines(arguments),
        *question_lines(planner.question),
        *verdict_lines(planner, verdict),
        *(figure_lines(verdict) if arguments.figure else ()),
    ]
    print("\n".join(told))
    sys.stdout.flush()
    return 0 if verdict.fits else 1


def search_parser() -> argparse.ArgumentParser:
    """What `tools/plan_parallelism.py` takes, but for its trials."""
    made = parser("plan_parallelism.py", "Rank the legal layouts of a run by predicted step time.")
    made.add_argument("--top", type=int, default=SHOWN, metavar="N", help="rows of the table (%(default)s)")
    return made


def searched(arguments: argparse.Namespace) -> tuple[Planner, Answer]:
    """The ranked layouts of a parsed command line. Raises ConfigError, for what a run would refuse as well."""
    if arguments.gpus is None:
        raise ConfigError("--gpus: no number of devices is given; give one")
    path, overrides = source(arguments)
    config = load_run(path, overrides, arguments.hf, lambda config: check_model(config.model)).config
    planner = Planner(question(arguments, config, arguments.gpus))
    answer = planner.answer(arguments.top)
    for verdict in answer.best or answer.unfit[:1]:
        raise_if_any(check_run(verdict.candidate.run(config), arguments.gpus))
    return planner, answer


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """What both commands take."""
    made = argparse.ArgumentParser(prog=program, description=description)
    made.add_argument(
        "items", nargs="*", metavar="FILE | section.key=value", help="YAML file, then overrides"
    )
    made.add_argument("--hf", metavar="DIR", help="take the model from the config.json in this folder")
    made.add_argument(
        "--gpus", type=int, metavar="N", help="ranks; `plan` takes the fewest where it is not given"
    )
    made.add_argument(
        "--gpu", default="H100", choices=sorted(DEVICES), help="table of the device (%(default)s)"
    )
    made.add_argument(
        "--calibrate",
        metavar="FILE",
        action="append",
        default=[],
        help="JSON with measured values in place of the table's; may be given again",
    )
    made.add_argument(
        "--memory", type=float, metavar="GIB", help="memory of a device, in place of the table's"
    )
    made.add_argument(
        "--visual-share",
        type=float,
        default=0.3,
        metavar="X",
        help="part of the tokens that are visual (%(default)s)",
    )
    made.add_argument(
        "--document-tokens",
        type=int,
        metavar="N",
        help="length of the documents of packed rows; default: one a row",
    )
    made.add_argument("--figure", action="store_true", help="draw the memory of each stage")
    return made


def source(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """(YAML file, overrides). Raises ConfigErrors without a run."""
    path, overrides = split_items(arguments.items)
    if path is None and arguments.hf is None:
        problem = Problem("config", None, "no run is given", "give a YAML file or --hf DIR", show_value=False)
        raise ConfigErrors([problem])
    return path, overrides


def question(arguments: argparse.Namespace, config: RunConfig, world_size: int) -> Question:
    """The question that the command line asks. Raises ConfigError."""
    if not 0 <= arguments.visual_share < 1:
        raise ConfigError(f"--visual-share {arguments.visual_share}: must be at least 0 and below 1")
    if arguments.document_tokens is not None and arguments.document_tokens < 1:
        raise ConfigError(f"--document-tokens {arguments.document_tokens}: must be at least 1")
    if arguments.document_tokens is not None and not config.data.packing.enabled:
        raise ConfigError(
            "--document-tokens: rows hold one document without data.packing.enabled; leave it out"
        )
    if world_size < 1:
        raise ConfigError(f"--gpus {world_size}: must be at least 1")
    device = device_of(arguments.gpu, *arguments.calibrate)
    if arguments.memory is not None:
        if not (math.isfinite(arguments.memory) and round(arguments.memory * GIB) > 0):
            raise ConfigError(f"--memory {arguments.memory:g}: must be a number of GiB above 0")
        device = replace(device, memory=round(arguments.memory * GIB))
    reason = why_not(config, device)
    if reason is not None:
        raise ConfigError(reason)
    return Question(config, device, world_size, arguments.visual_share, arguments.document_tokens)


def calibration_lines(arguments: argparse.Namespace) -> list[str]:
    """For each file of measured values, what of the table it replaces. Raises ConfigError."""
    nominal, lines = DEVICES[arguments.gpu], []
    for file in arguments.calibrate:
        told = [
            f"{name} {value:.4g} ({getattr(nominal, name):.4g})"
            for name, value in measured_values(file).items()
        ]
        lines.append(f"Measured, from {file} (in brackets the {nominal.name} table's): {', '.join(told)}")
    return lines


def candidate_of(config: RunConfig, world_size: int) -> Candidate:
    """The layout of a checked run."""
    layout = Layout.from_config(config.parallel, world_size)
    layers = config.parallel.pipeline_decoder_layers
    return Candidate(
        layout,
        None if layers is None else tuple(layers),
        config.train.micro_batch_size,
        num_microbatches(config.train, layout.dp),
        config.recompute,
    )
