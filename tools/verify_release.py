#!/usr/bin/env python3
"""Hold a downloaded STEP3-VL release against what this package expects of it.

    python tools/verify_release.py DIR           names, shapes, dtypes, config, token ids, chat template
    python tools/verify_release.py DIR --json    the same as JSON
    python tools/verify_release.py DIR --logits --trust-remote-code
                                                 also logits on five images against the release's own code

Each check prints ok, differs or skipped (reason). Exit code 0: nothing differs; 1: something does; 2: a bad
command. No weight is read without --logits, so the first form takes seconds.

This was written without the release's 20 GB at hand: it ran on small checkpoints in the released layout, and
--logits only with a stand-in for the release's code. A difference may therefore be an error of what is
expected here (megatron_vl/checkpoint/release.py, from public ports and model pages).

--logits loads the release with transformers, which executes the Python files of DIR with your rights. It does
so only with --trust-remote-code; read those files first (their SHA-256 sums are printed). Code outside of DIR
is never loaded. It needs transformers (4.57.0 by the release's README), a tokenizer.json and, in bf16, 21 GB
of memory; the two models are loaded one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

# A clone runs its own code, installed or not; nothing is fetched from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from megatron_vl.checkpoint.release import (  # noqa: E402
    DIFFERS,
    SKIPPED,
    Check,
    Expected,
    check_config,
    check_generation_config,
    check_tensors,
    check_tokens,
    expected_release,
)
from megatron_vl.errors import ConfigError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    problem = _bad_command(options)
    try:
        expected = expected_release(options.model_from)
    except ConfigError as error:
        problem = str(error)
    if problem:
        print(f"verify_release.py: {problem}", file=sys.stderr)
        return 2
    checks = _checks(options, expected)
    print(json.dumps([asdict(check) for check in checks], indent=1) if options.json else _report(checks))
    return int(any(check.status == DIFFERS for check in checks))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="the release: config.json, shards, index, ..."
    )
    parser.add_argument(
        "--model-from",
        default="step3_vl_10b",
        metavar="PRESET|DIR",
        help="what is expected: a preset (default step3_vl_10b), or a folder with a config.json",
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, if DIR has none")
    parser.add_argument("--logits", action="store_true", help="compare logits with the release's own code")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="agree that --logits executes the Python files of DIR",
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="images for --logits (default: five are drawn)",
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="compute dtype of --logits")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of --logits")
    return parser  # fmt: skip


def _bad_command(options: argparse.Namespace) -> str:
    files = [*options.images, *([options.tokenizer] if options.tokenizer else [])]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        return f"no such file: {', '.join(missing)}"
    return "" if options.directory.is_dir() else f"{options.directory}: no such folder"


def _checks(options: argparse.Namespace, expected: Expected) -> list[Check]:
    from megatron_vl.parity.release_template import check_template

    directory = options.directory
    checks = [check(directory, expected)
              for check in (check_tensors, check_config, check_generation_config, check_tokens)]  # fmt: skip
    checks.append(check_template(directory, expected, options.tokenizer))
    return [*checks, _logits(options, expected, checks)]


def _logits(options: argparse.Namespace, expected: Expected, before: list[Check]) -> Check:
    """The comparison of logits, where it was asked for and the weights fit."""
    broken = [
        check.name for check in before if check.name in ("tensors", "config") and check.status == DIFFERS
    ]
    if not options.logits:
        return Check("logits", SKIPPED, "not asked for: --logits")
    if broken:
        return Check("logits", SKIPPED, f"differences in {' and '.join(broken)} come first")
    from megatron_vl.parity.release_logits import Options, check_logits

    asked = Options(
        tuple(options.images), options.trust_remote_code, options.dtype, options.device, options.tokenizer
    )
    return check_logits(options.directory, expected, asked)


def _report(checks: list[Check]) -> str:
    lines = []
    for check in checks:
        summary = f"({check.summary})" if check.status == SKIPPED else check.summary
        lines.append(f"{check.name:<18}{check.status:<9}{summary}")
        lines += [f"  - {line}" for text in check.differences for line in text.splitlines()]
        lines += [f"    {note}" for note in check.notes]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
