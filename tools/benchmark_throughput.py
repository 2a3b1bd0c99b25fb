#!/usr/bin/env python3
"""How fast the parts of training are on this machine, each against something that is measured in the same run.

    python tools/benchmark_throughput.py images                          decode, resize and normalise, per core
    python tools/benchmark_throughput.py images --sizes 1920x1080 --json images.json
    python tools/benchmark_throughput.py loss                            chunked cross entropy: memory, time
    python tools/benchmark_throughput.py step RUN.yaml --nproc 4         training steps of any run in any layout
    python tools/benchmark_throughput.py step RUN.yaml --against-plain   ... against plain PyTorch, on one CPU rank
    python tools/benchmark_throughput.py tower RUN.yaml                  the vision tower against plain PyTorch
    python tools/benchmark_throughput.py kernels                         each operation against its twins; ceilings
    python tools/benchmark_throughput.py collectives --nproc 4           collectives over the groups of a layout
    python tools/benchmark_throughput.py placements                      where the tower is, in a pipeline

Exit code 0: measured, and what was computed is right; 1: something was not, or (--require) too slow; 2: a bad
command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

# A clone measures its own code, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.bench import collectives, images, kernels, loss, placements, step, tower  # noqa: E402
from megatron_vl.errors import MegatronVLError  # noqa: E402

BENCHMARKS = {
    "images": images,
    "loss": loss,
    "step": step,
    "tower": tower,
    "kernels": kernels,
    "collectives": collectives,
    "placements": placements,
}  # each has HELP, add_arguments(parser), run(options) -> (report, record, good)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.HELP)
        command.add_argument("--json", metavar="FILE", help="write everything measured to FILE")
        module.add_arguments(command)
    arguments = sys.argv[1:] if arguments is None else arguments
    options, left = parser.parse_known_args(arguments)
    # argparse takes overrides up to the first option only
    if left and (not hasattr(options, "overrides") or any(text.startswith("-") for text in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides = [*options.overrides, *left]
    options.again = [sys.executable, str(Path(__file__).resolve()), *arguments]  # what each local rank runs
    try:
        report, record, good = BENCHMARKS[options.benchmark].run(options)
        if report:  # ranks other than the first, and who started them, have none
            print(report)
        if options.json and report:
            write_json(Path(options.json), record)
    except (MegatronVLError, OSError) as error:
        print(f"benchmark_throughput.py: {error}", file=sys.stderr)
        return 2
    return 0 if good else 1


def write_json(path: Path, record: dict[str, Any]) -> None:
    """What was measured, for `--json`."""
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
