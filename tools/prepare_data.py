#!/usr/bin/env python3
"""Curates training data: keeps samples, drops others with a reason each, and reports every one of them.

    python tools/prepare_data.py examples/curate/curate.yaml
    python tools/prepare_data.py curate.yaml --workers 8 output=data/curated qr_codes.enabled=true
    python tools/prepare_data.py curate.yaml --check           says what would be done, and does nothing

The YAML names the sources, the rules and their limits; docs/curation.md has a table of them. Below `output`
come `kept/<source>.jsonl`, `dropped.jsonl`, `removed_images.jsonl`, `mosaic/` and `report.json`. A run that
was interrupted continues when the same command is given again; the bytes of the outputs do not depend on the
number of workers or on interruptions. Exit code: 0; 2 for a description or data that cannot be used; 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A clone runs its own code, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.config.dump import to_yaml  # noqa: E402
from megatron_vl.data.curate.report import to_table  # noqa: E402
from megatron_vl.data.curate.run import curate  # noqa: E402
from megatron_vl.data.curate.settings import load_curation  # noqa: E402
from megatron_vl.errors import MegatronVLError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        config = load_curation(options.config, options.overrides)
        if options.check:
            print(to_yaml(config), end="")
            return 0
        report = curate(config, options.workers, options.restart, say=_say)
    except KeyboardInterrupt:
        print("prepare_data.py: interrupted; the same command continues", file=sys.stderr)
        return 130
    except MegatronVLError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare_data.py: {error.filename}: {error.strerror}; check the folder", file=sys.stderr)
        return 2
    print(to_table(report))
    print(f"report: {Path(config.output) / 'report.json'}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that win over the file"
    )
    parser.add_argument("--workers", type=_workers, default=1, help="processes (default 1: this one)")
    parser.add_argument(
        "--restart", action="store_true", help="throw away what an earlier run left in output"
    )
    parser.add_argument("--check", action="store_true", help="check the description and print it whole")
    return parser


def _workers(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 process is needed")
    return value


if __name__ == "__main__":
    sys.exit(main())
