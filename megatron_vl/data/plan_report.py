"""What a data plan comes to: rows, tokens, documents and epochs per phase and domain, to print and to store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_vl.data.row_plan import RowPlan, assign_rows, balance_of
from megatron_vl.errors import DataError

STEPS_LOOKED_AT = 32


@dataclass(frozen=True)
class DomainTotals:
    """One domain in one phase, over the steps of the run. wanted, share: of the tokens of all domains.

    tokens: without padding. documents: those that are trained on, repetitions counted. epochs: tokens / tokens
    of the domain.
    """

    name: str
    modality: str
    wanted: float
    share: float
    tokens: int
    documents: int
    epochs: float


@dataclass(frozen=True)
class PhaseTotals:
    """One phase over the steps of the run. padded_tokens: of the documents, before the rows are filled up.

    empty_rows: rows without a document, which fill the last step of a phase in epochs.
    """

    rows: int
    empty_rows: int
    row_tokens: int
    tokens: int
    padded_tokens: int
    globals_: int
    crops: int
    text_share: float
    domains: list[DomainTotals]

    @property
    def efficiency(self) -> float:
        """Share of the rows' tokens that belong to documents."""
        return self.tokens / self.row_tokens


def phase_totals(plan: RowPlan) -> list[PhaseTotals]:
    """Exact totals of each phase, from the first row of the run to the last one of its last step."""
    return [_totals(plan, phase) for phase in range(len(plan.orders))]


def _totals(plan: RowPlan, phase: int) -> PhaseTotals:
    windows, settings = plan.windows, plan.settings
    last_row = plan.num_steps * settings.global_batch_size
    mine = np.flatnonzero((windows.phase == phase) & (windows.first_row[:-1] < last_row))
    whole = mine[windows.first_row[mine + 1] <= last_row]
    documents, tokens = windows.documents[whole].sum(axis=0), windows.tokens[whole].sum(axis=0)
    contents = windows.contents[whole].sum(axis=0)
    rows = int((windows.first_row[whole + 1] - windows.first_row[whole]).sum())
    empty = 0
    for window in mine[-1:]:  # the only one that the run may leave in the middle, or that has empty rows
        used = plan.window_rows(int(window))[: last_row - int(windows.first_row[window])]
        empty = sum(row.tokens == 0 for row in used)
        if len(whole) < len(mine):
            rows += len(used)
            for document in (document for row in used for document in row.documents if document.tokens):
                documents[document.domain] += 1
                tokens[document.domain] += document.tokens
                padded = int(settings.units(np.int64(document.tokens))) * settings.pad_multiple
                contents += (padded, document.num_globals, document.num_crops)
    total = max(int(tokens.sum()), 1)
    domains = [
        DomainTotals(
            config.name,
            config.modality,
            plan.orders[phase].shares[number],
            int(tokens[number]) / total,
            int(tokens[number]),
            int(documents[number]),
            int(tokens[number]) / domain.stream.tokens_per_epoch if domain.stream else 0.0,
        )
        for number, (config, domain) in enumerate(zip(settings.domains, plan.domains))
    ]
    text = sum(domain.share for domain in domains if domain.modality == "text")
    padded, globals_, crops = contents.tolist()
    row_tokens = rows * settings.seq_length
    return PhaseTotals(rows, empty, row_tokens, int(tokens.sum()), padded, globals_, crops, text, domains)


def check_epochs(plan: RowPlan) -> None:
    """Raises DataError when the run repeats a domain more often than its `max_epochs`."""
    phases = phase_totals(plan)
    for number, domain in enumerate(plan.settings.domains):
        epochs = sum(phase.domains[number].epochs for phase in phases)
        if domain.max_epochs is not None and epochs > domain.max_epochs:
            raise DataError(
                f"the plan repeats domain {domain.name} {epochs:.2f} times, more than its max_epochs = "
                f"{domain.max_epochs:g}; lower its weight, shorten the run, or raise max_epochs"
            )


def mean_balance(plan: RowPlan, dp_size: int) -> tuple[float, float]:
    """Means of `Balance.vision` and `Balance.total` over steps that are spread evenly over the run."""
    steps = np.unique(np.linspace(0, plan.num_steps - 1, min(STEPS_LOOKED_AT, plan.num_steps)).astype(int))
    found = [balance_of(assign_rows(plan.step(int(step)), dp_size), plan.settings) for step in steps]
    return float(np.mean([b.vision for b in found])), float(np.mean([b.total for b in found]))


def report_lines(plan: RowPlan, dp_size: int | None = None) -> list[str]:
    """The plan as a table. dp_size: also how evenly the work lies on so many data-parallel ranks."""
    settings, phases = plan.settings, phase_totals(plan)
    kind = f"packed in multiples of {settings.pad_multiple}" if settings.packed else "one document per row"
    lines = [
        f"Data plan: {plan.num_steps:,} steps of {settings.global_batch_size} rows of "
        f"{settings.seq_length:,} tokens, {kind}"
    ]
    for number, phase in enumerate(phases):
        lines += _phase_lines(plan, number, phase)
    for domain in plan.domains:
        index, reasons = domain.index, domain.refused()
        samples, pieces = index.split()
        if samples:
            lines.append(
                f"  cut at turns in domain {index.name}: {samples:,} of {index.num_samples:,} samples, into "
                f"{pieces:,} documents"
            )
        if reasons:
            shown = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
            kind = "samples" if index.pieces is None else "documents"
            lines.append(
                f"  refused in domain {index.name}: {sum(reasons.values()):,} of {len(index):,} {kind}: {shown}"
            )
        left_out = domain.index.left_out
        if left_out:
            shown = ", ".join(f"{reason} {count:,}" for reason, count in left_out.items())
            lines.append(f"  images that pages of domain {domain.index.name} go without: {shown}")
    if dp_size is not None and settings.packed:
        vision, total = mean_balance(plan, dp_size)
        lines.append(
            f"  largest / mean over {dp_size} data-parallel ranks, mean over steps: vision work {vision:.3f}, "
            f"all work {total:.3f}"
        )
    return lines


def _phase_lines(plan: RowPlan, number: int, phase: PhaseTotals) -> list[str]:
    settings = plan.settings
    steps = phase.rows / settings.global_batch_size
    filler = f", {phase.empty_rows} of them empty to fill the step" if phase.empty_rows else ""
    padding = (phase.padded_tokens - phase.tokens) / phase.row_tokens if phase.row_tokens else 0.0
    lines = [
        f"  phase {number}: {steps:,g} steps, {phase.rows:,} rows{filler}, {phase.tokens:,} tokens; "
        f"{phase.efficiency:.2%} of the rows filled, {padding:.2%} padding of documents",
        f"    text : multimodal = {phase.text_share:.4f} : {1 - phase.text_share:.4f} by tokens; "
        f"{phase.globals_:,} global views, {phase.crops:,} crops",
    ]
    table = [("domain", "modality", "wanted", "share", "tokens", "documents", "epochs", "")]
    for domain in phase.domains:
        often = domain.epochs / max(steps, 1) > 1
        table.append(
            (
                domain.name,
                domain.modality,
                f"{domain.wanted:.4f}",
                f"{domain.share:.4f}",
                f"{domain.tokens:,}",
                f"{domain.documents:,}",
                f"{domain.epochs:.3f}",
                "repeats within a step" if often else "",
            )
        )
    return lines + _aligned(table)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        ("    " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths))).rstrip() for row in table
    ]


def record_of(plan: RowPlan) -> dict[str, Any]:
    """The same as plain data, to be stored as JSON beside the run."""
    return {
        "digest": plan.digest,
        "steps": plan.num_steps,
        "global_batch_size": plan.settings.global_batch_size,
        "seq_length": plan.settings.seq_length,
        "phases": [{**asdict(phase), "efficiency": phase.efficiency} for phase in phase_totals(plan)],
        "refused": {domain.index.name: domain.refused() for domain in plan.domains},
        "left_out": {domain.index.name: domain.index.left_out for domain in plan.domains},
        "split": {
            domain.index.name: dict(zip(("samples", "documents"), domain.index.split()))
            for domain in plan.domains
        },
    }
