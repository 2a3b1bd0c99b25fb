"""The one report of a curation run: what was kept, what was dropped and why, per source and in all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_vl.config.dump import to_mapping
from megatron_vl.data.curate.reasons import meaning
from megatron_vl.data.curate.rules import CurationConfig

Counts = dict[str, Counter[str]]

SECTIONS = (
    "aspect_ratio",
    "qr_codes",
    "degenerate_text",
    "degenerate_images",
    "decontamination",
    "near_duplicates",
    "concept_balance",
    "captions",
    "grounding",
    "mosaic",
)
_MOST_HITS = 50


def add_counts(total: Counts, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Adds the counts of a chunk."""
    for category, codes in counts.items():
        total.setdefault(category, Counter()).update(codes)


def make_report(
    config: CurationConfig,
    by_source: Mapping[str, Counts],
    facts: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The report as plain data: no times, nothing about workers, so that equal runs give equal bytes.

    by_source: counts per source name. facts: what rules over all samples say. outputs: lines and SHA-256 of
    the files. The sums are checked: read = kept + merged into mosaics + dropped, in every column.
    """
    total: Counts = {}
    for counts in by_source.values():
        add_counts(total, counts)
    columns = {name: _column(counts) for name, counts in by_source.items()}
    columns_total = _column(total)
    for column in [*columns.values(), columns_total]:
        parts = column["kept"] + column["merged_into_mosaics"] + sum(column["dropped"].values())
        assert column["read"] == parts, f"{column['read']} samples read, {parts} accounted for"
    reasons = sorted(
        columns_total["dropped"] | columns_total["removed_images"] | columns_total["failed_images"]
    )
    off = [name for name in SECTIONS if not getattr(config, name).enabled]
    return {
        "total": columns_total,
        "sources": columns,
        "reasons": {reason: meaning(reason) for reason in reasons},
        "rules_off": off,
        "facts": dict(facts),
        "benchmark_items_with_most_hits": _most(total.get("benchmark_items", Counter())),
        "outputs": dict(outputs),
        # without what changes no sample: equal runs give equal reports
        "config": {
            name: value
            for name, value in to_mapping(config).items()
            if name not in ("output", "chunk_samples")
        },
    }


def to_json(report: Mapping[str, Any]) -> bytes:
    return json.dumps(report, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"


def to_table(report: Mapping[str, Any]) -> str:
    """The report for the console: one line per source and outcome, sources first, the total last."""
    rows = [("source", "outcome", "samples", "share")]
    for name, column in [*report["sources"].items(), ("total", report["total"])]:
        rows += _rows(name, column)
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}"
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += _remarks(report)
    return "\n".join(lines)


def _column(counts: Counts) -> dict[str, Any]:
    samples = counts.get("samples", Counter())
    column: dict[str, Any] = {
        name: samples[name] for name in ("read", "kept", "merged_into_mosaics", "mosaics_added")
    }
    column["dropped"] = _ordered(counts.get("dropped", Counter()))
    column["images"] = _ordered(counts.get("images", Counter()))
    column["failed_images"] = _ordered(counts.get("failed_images", Counter()))
    column["removed_images"] = _ordered(counts.get("removed_images", Counter()))
    column["edits"] = _ordered(counts.get("edits", Counter()))
    return column


def _rows(name: str, column: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    whole = max(1, column["read"])

    def row(outcome: str, number: int) -> tuple[str, str, str, str]:
        return name, outcome, f"{number:,}", f"{100 * number / whole:.2f}%"

    yield row("read", column["read"])
    yield row("kept", column["kept"])
    if column["merged_into_mosaics"]:
        yield row("merged into mosaics", column["merged_into_mosaics"])
    for reason, number in column["dropped"].items():
        yield row(f"dropped: {reason}", number)


def _remarks(report: Mapping[str, Any]) -> list[str]:
    total = report["total"]
    lines = []
    if total["images"].get("seen"):
        failed, removed = sum(total["failed_images"].values()), sum(total["removed_images"].values())
        lines.append(
            f"images: {total['images']['seen']:,} seen, {failed:,} unreadable, "
            f"{removed:,} cut out of documents that were kept"
        )
    if total["mosaics_added"]:
        lines.append(f"mosaics: {total['mosaics_added']:,} written beside the samples kept")
    if total["edits"]:
        lines.append("edits: " + ", ".join(f"{name} {number:,}" for name, number in total["edits"].items()))
    for name, facts in report["facts"].items():
        shown = ", ".join(f"{key} {value:,}" for key, value in facts.items() if isinstance(value, int))
        lines.append(f"{name}: {shown}")
    if report["rules_off"]:
        lines.append(f"rules that were off: {', '.join(report['rules_off'])}")
    return lines


def _ordered(counter: Counter[str]) -> dict[str, int]:
    """Most frequent first, then by name: the order in which counts were added says nothing."""
    return dict(sorted(counter.items(), key=lambda entry: (-entry[1], entry[0])))


def _most(counter: Counter[str]) -> dict[str, int]:
    entries: Sequence[tuple[str, int]] = list(_ordered(counter).items())
    return dict(entries[:_MOST_HITS])
