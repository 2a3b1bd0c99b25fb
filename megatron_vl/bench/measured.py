"""`tools/plan_parallelism.py`: the planner's table, and with `--measure N` its first N layouts measured, ranked anew.

A trial is a short `benchmark_throughput.py step` on the devices that are here, with made-up rows of the shape that the
planner was asked about. One that fails, or takes too long or too much memory, is a row with its reason.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.errors import ConfigError
from megatron_vl.plan.devices import GIB
from megatron_vl.plan.plan_command import calibration_lines, search_parser, searched
from megatron_vl.plan.plan_lines import LAYOUT, aligned, answer_lines, block, layout_cells
from megatron_vl.plan.search import Planner, Verdict

WARM_UP, STEPS, SECONDS = 1, 3, 300.0


@dataclass(frozen=True)
class Measured:
    """What a trial took.

    seconds, least, most: of a step; median and range of those that count. processor: seconds of all ranks' processors
    in a step, which other work on the machine changes less. memory: bytes of the fullest rank; peak allocation on a
    GPU, resident size of the process on a CPU. machine, rows: what ran, and on what.
    """

    seconds: float
    least: float
    most: float
    processor: float
    memory: int
    machine: str
    rows: str


@dataclass(frozen=True)
class Trial:
    """A layout that was tried. place: in the predicted table, from 1. found: what was measured, or why there is
    nothing."""

    place: int
    verdict: Verdict
    found: Measured | str


def main(argv: Sequence[str], benchmark: Sequence[str]) -> int:
    """Prints the ranked table, and measures its first layouts where that is asked for.

    benchmark: command of `tools/benchmark_throughput.py`. Returns 0; 1 when nothing fits, or no trial came to its end.
    Raises ConfigError.
    """
    arguments = add_arguments(search_parser()).parse_intermixed_args(list(argv))
    check_arguments(arguments)
    planner, answer = searched(arguments)
    if arguments.measure is not None:
        from megatron_vl.bench.trials import check_possible  # needs torch, which the table does not

        check_possible(planner, answer.best[: arguments.measure])
    print("\n".join([*calibration_lines(arguments), *answer_lines(planner, answer, arguments.figure)]))
    sys.stdout.flush()
    if not answer.best:
        return 1
    if arguments.measure is None:
        return 0
    from megatron_vl.bench.trials import tried

    trials = tried(planner, answer.best[: arguments.measure], benchmark, arguments)
    print("\n".join(["", *measured_lines(planner, trials)]))
    sys.stdout.flush()
    return 0 if any(isinstance(trial.found, Measured) for trial in trials) else 1


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of the trials."""
    parser.add_argument(
        "--measure", type=int, metavar="N", help="try the first N layouts here, rank them anew"
    )
    parser.add_argument(
        "--measure-steps", type=int, default=STEPS, metavar="N",
        help="steps of a trial that count, behind one that warms up (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--measure-seconds", type=float, default=SECONDS, metavar="S",
        help="time that a trial may take, start of its ranks included (%(default)g)",
    )  # fmt: skip
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that mean nothing."""
    for name in ("top", "measure", "measure_steps", "measure_seconds"):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be a number above 0")
    if arguments.measure is not None and arguments.top < arguments.measure:
        raise ConfigError(
            f"--measure {arguments.measure}: the table has --top {arguments.top} rows; measure fewer or show more"
        )


def reranked(trials: Sequence[Trial]) -> list[Trial]:
    """Fastest first; behind them those without a time, as they were predicted."""

    def order(trial: Trial) -> tuple[bool, float, int]:
        known = isinstance(trial.found, Measured)
        return not known, trial.found.seconds if known else 0.0, trial.place

    return sorted(trials, key=order)


def measured_lines(planner: Planner, trials: Sequence[Trial]) -> list[str]:
    """The new table, and the YAML of its first row."""
    ranked = reranked(trials)
    known = [trial for trial in ranked if isinstance(trial.found, Measured)]
    head = f"{len(known)} of {len(ranked)} layouts measured"
    if known:
        first = known[0].found
        head += f", fastest first, on {planner.question.world_size:,} ranks of {first.machine}; {first.rows}"
    rows = [
        (
            "place", "before", *LAYOUT, "predicted s", "measured s", "least", "most", "ratio", "processor s",
            "planned GiB", "GiB",
        ),
        *(_row(planner, place, trial) for place, trial in enumerate(ranked, 1)),
    ]  # fmt: skip
    table = aligned(rows)
    reasons = ["", *("" if isinstance(t.found, Measured) else f"  {t.found}" for t in ranked)]
    lines = [f"{head}:", "", *(line + reason for line, reason in zip(table, reasons))]
    if not known:
        return [*lines, "", "No trial came to its end."]
    least = min(range(len(known)), key=lambda n: known[n].found.processor)
    if least and planner.question.device.on_cpu:
        lines += [
            "",
            f"Place {least + 1} took the fewest processor seconds: where other work ran meanwhile, they tell more.",
        ]
    title = f"# the fastest measured, for {planner.question.world_size:,} ranks"
    return [*lines, "", title, block(known[0].verdict.candidate).rstrip()]


def _row(planner: Planner, place: int, trial: Trial) -> tuple[str, ...]:
    verdict, found = trial.verdict, trial.found
    predicted, planned = verdict.time.total, f"{verdict.peak / GIB:.2f}"
    cells = (*layout_cells(planner, verdict.candidate), f"{predicted:.4g}")
    if not isinstance(found, Measured):
        return ("-", str(trial.place), *cells, *["-"] * 5, planned, "-")
    return (
        str(place), str(trial.place), *cells, f"{found.seconds:.4g}", f"{found.least:.4g}", f"{found.most:.4g}",
        f"{found.seconds / predicted:.2f}", f"{found.processor:.4g}", planned, f"{found.memory / GIB:.2f}",
    )  # fmt: skip
