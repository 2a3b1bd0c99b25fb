"""Stop in one layout, go on in another: losses, gradient norms, learning rates and samples must be the same.

    python tools/check_resume.py --matrix [--json OUT]
    python tools/check_resume.py --pairs tp2:pp2,dp4:tp4sp/tensor

CPU only, on up to 8 local ranks. Each pair trains 4 steps, saves, and trains 5 steps in the second layout. Exit code
0: all pairs are within 1e-5; 1: one is not; 2: bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
ROOT = Path(__file__).resolve().parent.parent
# A clone runs its own code, installed or not.
sys.path.insert(0, str(ROOT))

from megatron_vl.errors import ConfigError, MegatronVLError  # noqa: E402
from megatron_vl.parallel.world import LocalWorld  # noqa: E402
from megatron_vl.parity.resume import PAIRS, Compared, Matrix, end  # noqa: E402

CONFIG = ROOT / "examples" / "quickstart" / "quickstart.yaml"
# The quickstart's model with 4 key-value heads (for TP4), 8 rows a step (for DP8), a schedule that moves.
TOKENS_PER_STEP = 8 * 80
OVERRIDES = (
    "model.text.num_query_groups=4", "data.num_workers=0", "train.micro_batch_size=1", "train.global_batch_size=8",
    f"schedule.warmup_tokens={3 * TOKENS_PER_STEP}",
    f"schedule.phases=[{{tokens: {10 * TOKENS_PER_STEP}, lr_start: 0.0002, lr_end: 0.00002, style: cosine}}]",
)  # fmt: skip
COLUMNS = "{:<20}{:<20}{:<8}{:>10}{:>12}{:>8}{:>10}{:>9}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--matrix", action="store_true", help=f"all {len(PAIRS)} pairs")
    which.add_argument("--pairs", help="FIRST:SECOND,... e.g. tp2:pp2,dp4/plain:tp4sp/tensor")
    parser.add_argument("--json", metavar="OUT", help="also write the table as JSON")
    return parser


def parse_pairs(text: str) -> list[tuple[str, str]]:
    """``a:b,c:d``.

    Raises:
        ConfigError: an entry is no pair, or a layout is unknown.
    """
    pairs = []
    for part in text.split(","):
        names = part.split(":")
        if len(names) != 2:
            raise ConfigError(f"--pairs {part!r}: not FIRST:SECOND; e.g. tp2:pp2")
        for name in names:
            end(name)
        pairs.append((names[0], names[1]))
    return pairs


def draw_data(folder: Path) -> tuple[str, ...]:
    """A small set of the quickstart's pictures; the keys that name it."""
    command = [sys.executable, str(ROOT / "examples/quickstart/make_data.py"), "--out", str(folder)]
    sizes = ["--train-images", "60", "--heldout-questions", "60", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *sizes], check=True, env=environment, stdout=subprocess.DEVNULL)
    return (
        f"data.train=[{folder}/train.jsonl]", f"data.eval=[{folder}/heldout.jsonl]", f"data.data_root={folder}",
        f"data.tokenizer={folder}/tokenizer.model",
    )  # fmt: skip


def line(row: Compared) -> str:
    """One row of the printed table."""
    text = COLUMNS.format(
        row.first, row.second, row.status, f"{row.loss:.1e}", f"{row.grad_norm:.1e}",
        "equal" if row.lr_equal else "DIFFER", "equal" if row.samples_equal else "DIFFER", f"{row.seconds:.0f} s",
    )  # fmt: skip
    return text + (f"\n    {row.rule}" if row.rule else "")


def main() -> int:
    args = parser().parse_args()
    try:
        pairs = list(PAIRS) if args.matrix else parse_pairs(args.pairs)
    except MegatronVLError as error:
        print(f"check_resume: {error}", file=sys.stderr)
        return 2
    rows: list[Compared] = []
    print(
        COLUMNS.format("saved in", "resumed in", "status", "loss_rel", "grad_norm", "lr", "samples", "time")
    )
    with tempfile.TemporaryDirectory() as folder:
        keys = draw_data(Path(folder) / "data")
        size = max(end(name).ranks for pair in pairs for name in pair)
        with LocalWorld(size) as world:
            try:
                for row in Matrix(world, CONFIG, Path(folder), (*OVERRIDES, *keys)).all(pairs):
                    rows.append(row)
                    print(line(row), flush=True)
                    if args.json:
                        Path(args.json).write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
            except MegatronVLError as error:
                print(f"check_resume: {error}", file=sys.stderr)
                return 1
    good = sum(row.status == "ok" for row in rows)
    print(f"{good} of {len(rows)} pairs ok, {sum(row.seconds for row in rows):.0f} s")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
