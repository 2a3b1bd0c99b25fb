"""`benchmark_throughput.py kernels`: each operation against its PyTorch twins, and the ceilings of this machine.

At full width on CUDA, in bf16; at the tiny model's on a CPU, which shows that it works and no more. All ways of an
operation get the same random inputs and must give the same results and gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_vl.bench.calibration import Ceilings, measured_ceilings
from megatron_vl.bench.operations import KINDS, OF_VIEWS, OPERATIONS, Size, Tensors, Way, Work
from megatron_vl.bench.timing import Timer
from megatron_vl.checkpoint.meter import table
from megatron_vl.config.presets import STEP3_VL_10B, STEP3_VL_TINY
from megatron_vl.errors import ConfigError
from megatron_vl.plan.vision_share import GLOBAL

HELP = "operations of the model against their PyTorch twins; measured GEMM and copy ceilings"
OFF = {
    torch.bfloat16: 2e-2,
    torch.float32: 1e-4,
}  # relative difference of results and gradients from the first way


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--only", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS), metavar="OPERATION",
                        help=f"of {', '.join(OPERATIONS)} (default: all)")  # fmt: skip
    parser.add_argument("--views", type=int, nargs="+", help="views at once (default: 1 8 64; on CPU 1 2)")
    parser.add_argument("--tokens", type=int, help="of a packed row (default: 32768; on CPU 256)")
    parser.add_argument("--require", action="store_true", help="fail where an operation of ours is missing")
    parser.add_argument("--repeats", type=int, default=30, help="runs that count (default: %(default)s)")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any], bool]:
    """The report, the same as a record, and whether all ways gave the same."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if not cuda:
        torch.set_num_threads(1)
    if options.repeats < 1:
        raise ConfigError(f"--repeats {options.repeats}: at least one run must count")
    torch.manual_seed(0)
    model, dtype = (STEP3_VL_10B, torch.bfloat16) if cuda else (STEP3_VL_TINY, torch.float32)
    timer = Timer(device, options.repeats)
    ceilings = measured_ceilings(model, timer, dtype)
    tokens = options.tokens or (32768 if cuda else 256)
    views = options.views or ([1, 8, 64] if cuda else [1, 2])
    rows: list[dict[str, Any]] = []
    for name in options.only:
        for count, kind in [(n, k) for n in views for k in KINDS] if name in OF_VIEWS else [(0, GLOBAL)]:
            size = Size(model, count, kind, tokens, device, dtype)
            rows += measured(name, OPERATIONS[name](size), timer, ceilings, OFF[dtype])
            if cuda:
                torch.cuda.empty_cache()
    machine = torch.cuda.get_device_name(device) if cuda else "CPU, one thread"
    record = {
        "machine": {"device": machine, "torch": torch.__version__, "dtype": str(dtype)},
        "ceilings": ceilings.shown(),
        "rows": rows,
        "calibration": ceilings.calibration(),
    }
    good = all(row.get("within", not options.require) for row in rows)
    return report(record), record, good


def measured(
    name: str, work: Work, timer: Timer, ceilings: Ceilings, bound: float
) -> Iterator[dict[str, Any]]:
    """A row for each way: seconds forward, and with backward; what it reaches; what it is off."""
    first: Tensors | None = None
    for way, function in work.ways.items():
        results = once(function, work)
        off = max(map(difference, results, first)) if first else 0.0
        first = first or results
        del results
        row: dict[str, Any] = {
            "operation": name,
            "shape": work.shape,
            "way": way,
            "off": off,
            "within": off <= bound,
        }
        with torch.no_grad():
            row["forward_seconds"] = timer.median(lambda: function(*work.inputs))
        times = 1.0
        if work.backward:
            row["both_seconds"] = timer.median(lambda: once(function, work))
            times += work.backward
        seconds = row.get("both_seconds", row["forward_seconds"])
        row["bytes_per_second"] = times * work.nbytes / seconds
        row["of_copy"] = row["bytes_per_second"] / ceilings.copy
        if work.flops:
            row["flops"] = times * work.flops / seconds
            row["of_gemm"] = row["flops"] / ceilings.gemm
        yield row
    for way, reason in work.missing.items():
        yield {"operation": name, "shape": work.shape, "way": way, "missing": reason}


def once(function: Way, work: Work) -> Tensors:
    """Results, then gradients of all inputs that require one, for a gradient of ones times the sign of a pattern."""
    out = function(*work.inputs)
    outs = out if isinstance(out, tuple) else (out,)
    wanted = [x for x in work.inputs if x.requires_grad]
    if not work.backward:
        return outs
    return *(o.detach() for o in outs), *torch.autograd.grad(outs, wanted, [_slope(o) for o in outs])


def _slope(out: torch.Tensor) -> torch.Tensor:
    """A gradient that differs from row to row, the same for every way; cheap to make and not all ones."""
    rows = torch.arange(out.shape[0], device=out.device, dtype=torch.float32).mul_(0.7).cos_().to(out.dtype)
    return rows.view(-1, *[1] * (out.dim() - 1)).expand_as(out).contiguous()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference in the Frobenius norm; infinite where something is not finite."""
    off = torch.linalg.vector_norm(found.float() - expected.float()) / torch.linalg.vector_norm(
        expected.float()
    )
    return off.item() if torch.isfinite(off) else float("inf")


def report(record: dict[str, Any]) -> str:
    """The record for people."""
    machine, ceilings = record["machine"], record["ceilings"]
    told = ", ".join(f"{name} {value:.4g}" for name, value in ceilings.items())
    head = (
        "operation",
        "size",
        "way",
        "forward ms",
        "with backward",
        "TFLOP/s",
        "of GEMM",
        "GB/s",
        "of copy",
        "off",
    )
    rows = [head, *map(_line, record["rows"])]
    return f"{machine['device']}, torch {machine['torch']}, {machine['dtype']}\nceilings: {told}\n\n{table(rows)}"


def _line(row: dict[str, Any]) -> Sequence[str]:
    name = (row["operation"], row["shape"], row["way"])
    if "missing" in row:
        return (*name, "-", row["missing"][:60], "", "", "", "", "")
    both = row.get("both_seconds")
    flops = (f"{row['flops'] / 1e12:.4g}", f"{row['of_gemm']:.0%}") if "flops" in row else ("", "")
    return (
        *name, f"{row['forward_seconds'] * 1e3:.3f}", f"{both * 1e3:.3f}" if both else "", *flops,
        f"{row['bytes_per_second'] / 1e9:.4g}", f"{row['of_copy']:.0%}", f"{row['off']:.1e}",
    )  # fmt: skip
