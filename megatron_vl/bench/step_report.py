"""Steps of all ranks as one record, and the record as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vl.bench.phases import PHASES
from megatron_vl.checkpoint.meter import GIB, table
from megatron_vl.config.schema import RunConfig
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.plan.budget import num_microbatches
from megatron_vl.train.metrics import StepMetrics

NAMED = 3  # operations of a profile that the report names


@dataclass
class Measured:
    """Steps that count on this rank: what the log would say, seconds by phase, and processor seconds."""

    steps: list[StepMetrics] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """Median seconds of each phase over the steps, and of `processor`."""
        phases = {name: statistics.median(step[name] for step in self.phases) for name in PHASES}
        return phases | {"processor": statistics.median(self.processor)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def record_of(
    config: RunConfig, runtime: Runtime, measured: Measured, everyone: Sequence[dict[str, float]], about: str,
    peak: float, machine: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything that a published row needs; rates are those of the median step."""
    steps, layout = measured.steps, runtime.layout
    middle = sorted(steps, key=lambda m: m.step_seconds)[len(steps) // 2]
    return {
        "machine": machine,
        "layout": str(layout),
        "ranks": layout.world_size,
        "rows": {
            "global": config.train.global_batch_size,
            "micro": config.train.micro_batch_size,
            "micro_batches": num_microbatches(config.train, layout.dp),
            "tokens": config.data.seq_length,
        },
        "recompute": {"decoder": config.recompute.decoder, "vision": config.recompute.vision},
        "data": about,
        "views": {"images": middle.images, "crops": middle.crops, "balance": middle.vision_balance},
        "steps": len(steps),
        "step_seconds": spread([m.step_seconds for m in steps]),
        "processor_seconds": sum(rank["processor"] for rank in everyone),
        "tokens_per_second_per_gpu": middle.tokens_per_second_per_gpu,
        "model_tflops": middle.model_tflops,
        "mfu": middle.mfu,
        "mfu_of_tflops": peak / 1e12,
        "tower_share": middle.tower_share,
        "memory_bytes": max(m.memory_bytes for m in steps),
        "data_wait_seconds": spread([m.data_wait_seconds for m in steps]),
        "phases": {name: _over_ranks([rank[name] for rank in everyone]) for name in PHASES},
        "loss": middle.loss,
    }  # fmt: skip


def _over_ranks(seconds: Sequence[float]) -> dict[str, float]:
    return {"first": seconds[0], "min": min(seconds), "max": max(seconds)}


def report(record: dict[str, Any]) -> str:
    """The record for people."""
    seconds, rows, views = record["step_seconds"], record["rows"], record["views"]
    machine, waited = record["machine"], record["data_wait_seconds"]["median"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, {record['ranks']} ranks: {record['layout']}",
        f"{rows['global']} rows of {rows['tokens']:,} tokens, {rows['micro_batches']} micro-batches of "
        f"{rows['micro']}; recompute {record['recompute']['decoder']}/{record['recompute']['vision']}",
        f"data: {record['data']}",
        *([record["fake"]] if "fake" in record else []),
        "",
        f"step {seconds['median']:.4g} s (min {seconds['min']:.4g}, max {seconds['max']:.4g}) of {record['steps']}",
        f"{record['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU | {record['model_tflops']:.4g} TFLOP/s/GPU | MFU "
        f"{record['mfu']:.1%} of {record['mfu_of_tflops']:.4g} TFLOP/s, the tower's share {record['tower_share']:.1%}",
        f"peak memory {record['memory_bytes'] / GIB:.2f} GiB | data wait {waited:.4f} s | {views['images']} images, "
        f"{views['crops']} crops, balance {views['balance']:.2f}",
        "",
    ]
    total = sum(phase["first"] for phase in record["phases"].values()) or 1.0
    several = record["ranks"] > 1 and "fake" not in record
    head = ("phase", "s", "share", *(("least", "most of all ranks") if several else ()))
    lines.append(
        table([head, *(_row(name, phase, total, several) for name, phase in record["phases"].items())])
    )
    for item in record.get("largest", [])[:NAMED]:
        lines.append(
            f"{item['share']:6.1%} {item['seconds']:.4g} s in {item['calls']} calls of {item['name'][:80]}"
        )
    return "\n".join(lines)


def _row(name: str, phase: dict[str, float], total: float, several: bool) -> tuple[str, ...]:
    first = (name, f"{phase['first']:.4f}", f"{phase['first'] / total:.1%}")
    return (*first, f"{phase['min']:.4f}", f"{phase['max']:.4f}") if several else first
