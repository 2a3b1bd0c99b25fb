"""`python -m megatron_vl plan`: the plan of a layout, and with `--rank` what comes of it when a rank is built.

The plan itself needs no torch, so what builds is imported only when it is asked for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from megatron_vl.plan import plan_command
from megatron_vl.plan.candidates import Candidate
from megatron_vl.plan.rank_state import (
    Messages,
    RankState,
    differences,
    dry_microbatches,
    plan_rank,
    stages_of_rank,
)
from megatron_vl.plan.search import Question

COLUMNS = ("tower", "projector", "decoder", "weights", "gradients", "optimizer", "received", "sent")


def main(argv: Sequence[str]) -> int:
    """As `plan_command.main`; with `--rank` 0 when everything built is as planned, else 1."""
    return plan_command.main(argv, dry_run)


def dry_run(question: Question, candidate: Candidate, ranks: Sequence[int]) -> int:
    """Build the ranks one after the other, print plan and outcome of each, and what differs. Returns the exit code."""
    from megatron_vl.train.dry_rank import build_rank

    count = dry_microbatches(candidate.layout, candidate.num_microbatches)
    print(
        f"{candidate.layout}: a step of {count} micro-batches of {candidate.micro_batch} rows, without memory"
    )
    print("Parameters by part, bytes that stay, tensors from and to other stages:", flush=True)
    found = []
    for rank in ranks:
        begin = time.perf_counter()
        planned, built = plan_rank(question, candidate, rank), build_rank(question, candidate, rank)
        found += [f"rank {rank}: {line}" for line in differences(planned, built)]
        chunks = ", ".join(map(str, stages_of_rank(question, candidate, rank)))
        seconds = time.perf_counter() - begin
        print(f"{candidate.layout.describe(rank)}: {chunks}; {seconds:.1f} s")
        print("\n".join(table(planned, built)), flush=True)
    print("\n".join(found) if found else f"All as planned on {len(ranks)} of {question.world_size:,} ranks.")
    sys.stdout.flush()
    return 1 if found else 0


def table(planned: RankState, built: RankState) -> list[str]:
    """Two rows, planned and built, below names."""
    rows = [("", *COLUMNS), ("planned", *_cells(planned)), ("built", *_cells(built))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        ("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths))).rstrip() for row in rows
    ]


def _cells(state: RankState) -> tuple[str, ...]:
    numbers = (*state.parameters.values(), state.weight_bytes, state.gradient_bytes, state.optimizer_bytes)
    return (*(f"{number:,}" for number in numbers), _messages(state.received), _messages(state.sent))


def _messages(messages: Messages) -> str:
    return " + ".join(f"{count} x {list(shape)}" for shape, _, count in messages) or "-"
