"""What a run comes to: `python -m megatron_vl config FILE|--hf DIR [k=v ...] [--world-size N]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_vl.errors import ConfigErrors, Problem
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.report import report


def main(argv: Sequence[str]) -> int:
    """Prints the report and returns 0. Raises ConfigErrors with every problem of the run."""
    arguments = parse(argv)
    path, overrides = split_items(arguments.items)
    if path is None and arguments.hf is None:
        problem = Problem("config", None, "no run is given", "give a YAML file or --hf DIR", show_value=False)
        raise ConfigErrors([problem])
    loaded = load_checked_run(path, overrides, arguments.hf, arguments.world_size)
    world_size = arguments.world_size or loaded.config.parallel.model_parallel_size
    print("\n".join(report(loaded, world_size)))
    sys.stdout.flush()  # so that a closed pipe shows here
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of `config`."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vl config",
        description="Print a run with the origin of each value, its parameters, FLOPs, rank grid and stages.",
    )
    parser.add_argument(
        "items", nargs="*", metavar="FILE | section.key=value", help="YAML file, then overrides"
    )
    parser.add_argument("--hf", metavar="DIR", help="take the model from the config.json in this folder")
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks to lay out; default: the fewest that fit"
    )
    return parser.parse_intermixed_args(argv)


def split_items(items: Sequence[str]) -> tuple[str | None, list[str]]:
    """A first item without `=` is the YAML file; the rest are overrides."""
    if items and "=" not in items[0]:
        return items[0], list(items[1:])
    return None, list(items)
