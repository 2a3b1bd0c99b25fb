#!/usr/bin/env python3
"""What `tools/gpu_check.sh` has measured, beside what was asked for: one table, one JSON.

    gpu_summary.py FOLDER RESULTS.json

FOLDER: parts.tsv (name, exit code, seconds, limit), logs and JSON files of the parts. Exit code: 0 when every part ran
and every line is met, else 1. A line whose part has not run says why; nothing is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TIMED_OUT = (124, 137)
Records = Mapping[str, Any]


def of_kernels(records: Records, views: int, way: str) -> list[float]:
    """Seconds forward and backward of the projector at so many views, by grid; of the fastest way named so."""
    fastest: dict[str, float] = {}
    missing = []
    for row in records["kernels"]["rows"]:
        if row["operation"] != "projector" or not row["shape"].startswith(f"{views} x"):
            continue
        if "missing" in row:
            missing.append(row["missing"])
        elif row["way"].startswith(way):
            seconds = row["both_seconds"]
            fastest[row["shape"]] = min(seconds, fastest.get(row["shape"], seconds))
    if not fastest:
        raise LookupError(missing[0] if missing else f"no projector, {way}, at {views} views")
    return [fastest[shape] for shape in sorted(fastest)]


def projector_against(records: Records, way: str) -> float:
    """The least ratio of a way's time to ours over grids and numbers of views."""
    ratios = [
        other / own
        for views in (1, 8, 64)
        for other, own in zip(of_kernels(records, views, way), of_kernels(records, views, "ours"))
    ]
    return min(ratios)


def projector_of_gemm(records: Records) -> float:
    """Share of the GEMM ceiling at 64 views: of each grid the fastest of our ways, then the smaller."""
    shares: dict[str, float] = {}
    for row in records["kernels"]["rows"]:
        mine = row["operation"] == "projector" and row["way"].startswith("ours")
        if mine and row["shape"].startswith("64 x") and "of_gemm" in row:
            shares[row["shape"]] = max(row["of_gemm"], shares.get(row["shape"], 0.0))
    if not shares:
        raise LookupError("our projector was not measured at 64 views")
    return min(shares.values())


def packed_against_apart(records: Records) -> float:
    """Time of packed attention over that of its documents one by one."""
    rows = {r["way"]: r for r in records["kernels"]["rows"] if r["operation"] == "packed_attention"}
    return rows["ours"]["both_seconds"] / rows["documents apart"]["both_seconds"]


def layer_seconds(records: Records, precision: str) -> float:
    """Median seconds of a decoder layer in a step."""
    few, many = (records[f"fp8_{precision}_{n}"]["step_seconds"]["median"] for n in (2, 8))
    return (many - few) / 6


def tower_of(records: Records, key: str) -> float:
    """The smaller value of both kinds of views, for our tower."""
    return min(row[key] for row in records["tower"]["rows"] if row["way"] == "ours")


# (what is asked for, at least / at most, bound, how it is read)
LINES: tuple[tuple[str, str, float, Callable[[Records], float]], ...] = (
    ("projector, stock / ours", ">=", 1.3, lambda r: projector_against(r, "stock (channels first)")),
    ("projector, channels last / ours", ">=", 1.0, lambda r: projector_against(r, "channels last")),
    ("projector, share of GEMM at 64 views", ">=", 0.70, projector_of_gemm),
    ("packed attention / documents apart", "<=", 1.1, packed_against_apart),
    ("text only 8k, MFU", ">=", 0.50, lambda r: r["text"]["mfu"]),
    ("image mixture, MFU with the tower", ">=", 0.45, lambda r: r["mixture"]["mfu"]),
    ("decoder layer, bf16 / FP8", ">=", 1.4, lambda r: layer_seconds(r, "none") / layer_seconds(r, "tensorwise")),
    ("tower, share of GEMM", ">=", 0.65, lambda r: tower_of(r, "of_gemm")),
    ("tower, best plain / ours", ">=", 1.15, lambda r: tower_of(r, "of_best_plain")),
)  # fmt: skip


def read_parts(folder: Path) -> list[dict[str, Any]]:
    """Parts that were started, with the last line of the log of those that failed."""
    parts = []
    lines = (folder / "parts.tsv").read_text().splitlines() if (folder / "parts.tsv").exists() else []
    for line in lines:
        name, code, seconds, limit = line.split("\t")
        part = {"name": name, "code": int(code), "seconds": int(seconds), "why": ""}
        if int(code) in TIMED_OUT:
            part["why"] = f"ran past its limit of {limit} s"
        elif int(code):
            log = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
            part["why"] = log[-1][:160] if log else "it said nothing"
        parts.append(part)
    return parts


def read_records(folder: Path) -> dict[str, Any]:
    """JSON files of the parts by name."""
    found = {path.stem: path for path in sorted(folder.glob("*.json")) if not path.stem.endswith(".trace")}
    return {name: json.loads(path.read_text()) for name, path in found.items()}


def judged(records: Records) -> list[dict[str, Any]]:
    """Every line of `LINES`: measured, and whether it is met; or why there is nothing."""
    lines = []
    for name, sense, bound, read in LINES:
        line: dict[str, Any] = {"line": name, "asked": f"{sense} {bound:g}", "measured": None, "met": False}
        try:
            line["measured"] = value = read(records)
            line["met"] = value >= bound if sense == ">=" else value <= bound
        except KeyError as error:
            line["why"] = f"not measured: {error.args[0]}"
        except (LookupError, ValueError, ZeroDivisionError) as error:
            line["why"] = f"not measured: {error}"
        lines.append(line)
    return lines


def main(arguments: list[str]) -> int:
    """Prints the table, writes the JSON."""
    folder, target = map(Path, arguments)
    parts, records = read_parts(folder), read_records(folder)
    lines = judged(records)
    for part in parts:
        print(
            f"{'ok' if part['code'] == 0 else 'FAILED':<7} {part['name']:<20} {part['seconds']:>5} s  {part['why']}"
        )
    print()
    for line in lines:
        value = "" if line["measured"] is None else f"{line['measured']:.3f}"
        met = "met" if line["met"] else "NOT MET"
        print(f"{met:<8} {line['line']:<40} {line['asked']:<8} {value:>8}  {line.get('why', '')}")
    for name in ("text", "mixture", "slice"):
        if name in records:
            record = records[name]
            seconds, memory = record["step_seconds"]["median"], record["memory_bytes"] / 2**30
            print(f"\n{name}: step {seconds:.3f} s, peak {memory:.1f} GiB")
            for item in record.get("largest", [])[:3]:
                print(f"  {item['share']:.1%} in {item['calls']} calls of {item['name'][:100]}")
    target.write_text(json.dumps({"parts": parts, "lines": lines, "records": records}, indent=1) + "\n")
    return 0 if parts and all(p["code"] == 0 for p in parts) and all(line["met"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
