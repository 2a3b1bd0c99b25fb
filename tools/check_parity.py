"""Compare every parallel layout with a reference: forward, loss and the gradient of every weight.

    python tools/check_parity.py --hf DIR --reference FILE.safetensors [--layouts all|tp2,pp2,...] [--json OUT]

    python tools/check_parity.py --hf DIR --packed-cases [text_only,...] [--layouts cp4,cp4ag,...]   # no reference

Exit code 0: every row is ok or refused by a rule; 1: something is over its bound; 2: bad arguments or files.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A clone runs its own code, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.errors import ConfigError, MegatronVLError  # noqa: E402
from megatron_vl.parity.check import (  # noqa: E402
    Row,
    check_all,
    check_devices,
    check_packed,
    make_cases,
    make_setting,
    parser,
    write_json,
)

COLUMNS = "{:<14}{:<10}{:<8}{:<9}{:>10}{:>12}{:>12}  {:<52}{:>8}"


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def line(row: Row) -> str:
    """One row of the printed table."""
    text = COLUMNS.format(
        row.layout, row.placement, row.format, row.status, shown(row.loss_rel), shown(row.logits_rel),
        shown(row.worst_grad), row.worst_name, shown(row.steps_rel),
    )  # fmt: skip
    more = [row.rule] if row.rule else []
    more += [f"first to diverge: {row.diverged}"] if row.diverged not in ("", "nothing") else []
    return "\n".join([text.rstrip(), *(f"    {m}" for m in more)])


PACKED_COLUMNS = "{:<16}{:<10}{:<20}{:<9}{:>10}{:>12}  {}"


def packed(args: argparse.Namespace) -> int:
    """Print the table of --packed-cases; the exit code."""
    print(
        PACKED_COLUMNS.format("layout", "placement", "case", "status", "loss_rel", "worst_grad", "worst_name")
    )
    rows = []
    for row in check_packed(args):
        rows.append(row)
        print(
            PACKED_COLUMNS.format(
                row.layout, row.placement, row.case, row.status, shown(row.loss), shown(row.worst_grad),
                row.worst_name or row.rule,
            ),
            flush=True,
        )  # fmt: skip
        if args.json:
            write_json(args.json, rows)
    count = {s: sum(r.status == s for r in rows) for s in ("ok", "failed", "refused")}
    print(f"{count['ok']} ok, {count['failed']} failed, {count['refused']} refused")
    return 1 if count["failed"] else 0


def main() -> int:
    args = parser().parse_args()
    try:
        if args.device == "auto":
            import torch

            args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.packed_cases:
            return packed(args)
        setting = make_setting(args)
        cases = make_cases(args.layouts, args.placements, args.formats, args.device)
        check_devices(cases, args.device)
        if not cases:
            raise ConfigError(f"--layouts {args.layouts!r} names no layout; nothing would be checked")
    except MegatronVLError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 2
    print(COLUMNS.format("layout", "placement", "format", "status", "loss_rel", "logits_rel", "worst_grad",
                         "worst_name", "steps"))  # fmt: skip
    rows = []
    try:
        for row in check_all(setting, cases, args.device):
            rows.append(row)
            print(line(row), flush=True)
            if args.json:
                write_json(args.json, rows)
    except MegatronVLError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 1
    count = {s: sum(r.status == s for r in rows) for s in ("ok", "failed", "refused")}
    print(f"{count['ok']} ok, {count['failed']} failed, {count['refused']} refused, "
          f"{sum(r.seconds for r in rows):.0f} s")  # fmt: skip
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
