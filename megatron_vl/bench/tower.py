"""`benchmark_throughput.py tower`: tower, downsamplers and projector, forward and backward, against plain PyTorch.

Ours as the trainer builds it (its recompute settings included), the plain one as it is written and, with ``--compile``,
through torch.compile. Same weights, same views.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from megatron_vl.bench.calibration import GEMM_SIZE
from megatron_vl.bench.kernels import OFF, difference
from megatron_vl.bench.plain_model import PlainTower, released
from megatron_vl.bench.quick_weights import QuickWeights
from megatron_vl.bench.timing import Timer, gemm_ceiling
from megatron_vl.checkpoint.meter import table
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.cost import train_flops, view_flops
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.vision_share import CROP, GLOBAL
from megatron_vl.train.build import build
from megatron_vl.train.pretrain import on_rank

HELP = "the vision tower against plain PyTorch: CONFIG [section.key=value ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for pretrain")
    parser.add_argument("--views", type=int, default=8, help="views at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="runs that count (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also the plain tower through torch.compile")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any], bool]:
    """The report, the same as a record, and whether all gave the same features and gradients."""
    loaded = load_checked_run(options.config, options.overrides, None, 1)
    config = loaded.config
    if (
        config.parallel.model_parallel_size != 1
        or config.model.freeze_vision
        or config.model.freeze_projector
    ):
        raise ConfigError(
            "tower: it is measured on one rank, with tower and projector trained; change these keys"
        )
    outcome: list[dict[str, Any]] = []

    def work(runtime, phase, stop) -> None:
        phase.enter("measuring the tower", limit=config.parallel.timeout_seconds)
        outcome.append(measure(config, runtime, options))

    on_rank(config, Layout.from_config(config.parallel, 1), work)
    record = outcome[0]
    return report(record), record, all(row["within"] for row in record["rows"])


def measure(config: RunConfig, runtime: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of views."""
    parts = build(config, runtime, QuickWeights(config.model, config.train.seed), with_optimizer=False)
    chunk = parts.chunks[0].module
    plain = PlainTower(config.model).to(runtime.device, parts.dtype)
    source = QuickWeights(config.model, config.train.seed)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(source(released(f"tower.{name}")).view(parameter.shape))
    timer = Timer(runtime.device, options.repeats, seconds=20.0)
    gemm = gemm_ceiling(timer, parts.dtype, GEMM_SIZE[runtime.device.type])
    rows = []
    for kind, side in ((GLOBAL, config.model.vision.image_size), (CROP, config.model.vision.crop_size)):
        pixels = torch.randn(options.views, 3, side, side, device=runtime.device)
        ways = {"plain": plain, "ours": chunk._encode}
        if options.compile:
            ways["plain, torch.compile"] = torch.compile(plain, dynamic=False)
        flops = options.views * sum(train_flops(config.model, view_flops(config.model, kind)).values())
        rows += compared(
            ways, pixels, parts.dtype, timer, {"flops": flops, "gemm": gemm, "side": side, "plain": plain}
        )
    return {
        "machine": {"torch": torch.__version__, "device": str(runtime.device), "dtype": str(parts.dtype)},
        "views": options.views,
        "gemm_flops": gemm,
        "rows": rows,
    }


def compared(
    ways: dict[str, Callable], pixels: torch.Tensor, dtype: torch.dtype, timer: Timer, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each way at one size of views."""
    expected, slope, rows = None, None, []
    for name, way in ways.items():
        given = pixels if name == "ours" else pixels.to(dtype)
        features = way(given)
        if slope is None:
            slope, expected = torch.randn_like(features), features.detach()

        def both() -> None:
            way(given).backward(slope)

        off = difference(features.detach(), expected)
        features.backward(slope)
        seconds = timer.median(both)
        about["plain"].zero_grad()
        rows.append(
            {
                "side": about["side"],
                "way": name,
                "seconds": seconds,
                "flops": about["flops"] / seconds,
                "of_gemm": about["flops"] / seconds / about["gemm"],
                "off": off,
                "within": off <= OFF[dtype],
            }  # fmt: skip
        )
    best = min(row["seconds"] for row in rows if row["way"] != "ours")
    for row in rows:
        row["of_best_plain"] = best / row["seconds"]
    return rows


def report(record: dict[str, Any]) -> str:
    """The record for people."""
    machine = record["machine"]
    rows = [("views", "way", "ms", "TFLOP/s", "of GEMM", "x best plain", "off")]
    for row in record["rows"]:
        rows.append(
            (
                f"{record['views']} x {row['side']}",
                row["way"],
                f"{row['seconds'] * 1e3:.2f}",
                f"{row['flops'] / 1e12:.4g}",
                f"{row['of_gemm']:.1%}",
                f"{row['of_best_plain']:.2f}",
                f"{row['off']:.1e}",
            )  # fmt: skip
        )
    gemm = f"GEMM {record['gemm_flops'] / 1e12:.4g} TFLOP/s"
    head = f"{machine['device']}, torch {machine['torch']}, {machine['dtype']}, {gemm}"
    return f"{head}; tower, downsamplers and projector, forward and backward\n\n{table(rows)}"
