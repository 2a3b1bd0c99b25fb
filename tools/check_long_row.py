"""Train one step on one long packed row in several layouts; compare losses, and activation memory per rank.

    python tools/check_long_row.py [--seq-length 131072] [--documents 60] [--images 110] [--layouts 1,cp8,tp2cp4sp]

Real view geometry, tiny widths, CPU. The first layout is what the others are compared with. Exit code 0: losses and
gradient norms agree within 1e-5, and every layout stays below its share of memory; 1 otherwise; 2: bad arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A clone runs its own code, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.config.schema import RecomputeConfig  # noqa: E402
from megatron_vl.errors import ConfigError, MegatronVLError  # noqa: E402
from megatron_vl.parallel.world import LocalWorld  # noqa: E402
from megatron_vl.parity.layouts import parse_layout  # noqa: E402
from megatron_vl.parity.long_row import LONG_MODEL, LongRow, Measured, job_of, make_row, run_long  # noqa: E402

BOUND = 1e-5
MEMORY_SHARE = 1.6  # a rank's activations, times the ranks that share a row, over those of one rank
COLUMNS = "{:<12}{:>7}{:>12}{:>11}{:>12}{:>12}{:>12}{:>12}{:>9}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-length", type=int, default=131_072)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--images", type=int, default=110)
    parser.add_argument(
        "--layouts", default="1,cp8,tp2cp4sp", help="names separated by commas; the first is the measure"
    )
    parser.add_argument(
        "--recompute", default="none", choices=("none", "full"), help="of decoder and tower, in all layouts"
    )
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that one layout may take")
    return parser.parse_args()


def run(name: str, spec: LongRow, recompute: RecomputeConfig, limit: float) -> tuple[list[Measured], float]:
    """One layout in processes of its own."""
    named = parse_layout(name, "data", "cpu")
    begin = time.monotonic()
    with LocalWorld(named.world_size, timeout=limit) as world:
        seen = world.run(named.world_size, run_long, job_of(named, spec, LONG_MODEL, recompute), limit=limit)
    return seen, time.monotonic() - begin


def main() -> int:
    arguments = parse()
    spec = LongRow(arguments.seq_length, arguments.documents, arguments.images)
    recompute = RecomputeConfig(decoder=arguments.recompute, vision=arguments.recompute)
    try:
        rows = make_row(spec, LONG_MODEL)
        names = [name for name in arguments.layouts.split(",") if name]
        if not names:
            raise ConfigError(f"--layouts {arguments.layouts!r} names no layout; nothing would be checked")
        views, lengths = sum(len(row.view_kinds) for row in rows), [len(row.ids) for row in rows]
        print(
            f"{spec.seq_length} tokens: {len(rows)} documents of {min(lengths)} to {max(lengths)} tokens, "
            f"{spec.images} images in {views} views; recompute {arguments.recompute}"
        )
        print(
            COLUMNS.format(
                "layout", "ranks", "loss", "loss_rel", "norm_rel", "act GiB", "x ranks", "pixel GiB", "s"
            )
        )
        failed, first = 0, None
        for name in names:
            seen, seconds = run(name, spec, recompute, arguments.limit)
            worst = max(seen, key=lambda m: m.activation_bytes)
            first = first or worst
            far = abs(worst.loss - first.loss) / abs(first.loss)
            norm = abs(worst.grad_norm - first.grad_norm) / first.grad_norm
            share = worst.activation_bytes * len(seen) / first.activation_bytes
            pixels = max(m.pixel_bytes for m in seen)
            failed += not (far <= BOUND and norm <= BOUND and share <= MEMORY_SHARE)
            print(
                COLUMNS.format(
                    name, len(seen), f"{worst.loss:.6f}", f"{far:.1e}", f"{norm:.1e}",
                    f"{worst.activation_bytes / 2**30:.3f}", f"{share:.2f}", f"{pixels / 2**30:.3f}", f"{seconds:.0f}",
                ),
                flush=True,
            )  # fmt: skip
    except MegatronVLError as error:
        print(f"check_long_row: {error}", file=sys.stderr)
        return 2
    if failed:
        print(
            f"{failed} of {len(names)} layouts are over a bound (loss, norm {BOUND:g}; memory {MEMORY_SHARE:g} / ranks)"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
