"""`benchmark_throughput.py collectives`: what the links of a layout's groups carry, and how long they take to begin.

Every group of one axis works at the same time, as it does in training. Rates are of the bytes that one rank sends: for
an all-gather or reduce-scatter over n ranks (n - 1) / n of the whole tensor, for an all-reduce twice that, for an
all-to-all (n - 1) / n of a rank's tensor, between two ranks all of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_vl.bench.calibration import cores
from megatron_vl.checkpoint.meter import table
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.launch import launched, read_environment, run_local
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.layout import Layout
from megatron_vl.train.pretrain import beats_folder, on_rank, stop_seconds

HELP = "collectives over the groups of a layout, on gloo or NCCL: [CONFIG] [section.key=value ...] --nproc N"
AXES = ("tp", "cp", "dp", "dp_cp", "tp_cp", "pp")
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
WARM_UP = 2
DEFAULT_KIB = {"cpu": [4, 256, 4096], "cuda": [4, 256, 4096, 65536, 524288]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("overrides", nargs="*", metavar="CONFIG section.key=value",
                        help="a YAML file, and keys as for pretrain; only the layout matters")  # fmt: skip
    parser.add_argument("--nproc", type=int, default=1, help="start this many local ranks (default 1)")
    parser.add_argument("--kib", type=int, nargs="+", help="sizes of the whole tensor in KiB")
    parser.add_argument("--repeats", type=int, default=10, help="runs that count (default: %(default)s)")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any], bool]:
    """The report, the same as a record, and True. Only rank 0 has a report."""
    files = [text for text in options.overrides if "=" not in text]
    keys = [text for text in options.overrides if "=" in text]
    if len(files) > 1 or options.repeats < 1:
        raise ConfigError(
            f"collectives: {', '.join(files)}, {options.repeats} repeats: at most one CONFIG, at least 1 run"
        )
    world_size = read_environment().world_size if launched() else options.nproc
    # rows and layers that any layout divides: nothing of the model is built
    config = load_checked_run(files[0] if files else None, keys, None, world_size).config
    layout = Layout.from_config(config.parallel, world_size)
    if options.nproc > 1 and not launched():
        return "", {}, run_local(options.again, layout, beats_folder(config), stop_seconds(config)) == 0
    outcome: list[dict[str, Any]] = []

    def work(runtime: Runtime, phase: Any, stop: Any) -> None:
        phase.enter("measuring collectives", limit=config.parallel.timeout_seconds)
        outcome.append(measure(config, runtime, options.kib, options.repeats))

    on_rank(config, layout, work)
    record = outcome[0]
    return (report(record) if read_environment().rank == 0 else ""), record, True


@dataclass(frozen=True)
class Collective:
    """run: does it once. sent: bytes that a rank sends."""

    run: Callable[[], Any]
    sent: float


def measure(config: RunConfig, runtime: Runtime, kib: Sequence[int] | None, repeats: int) -> dict[str, Any]:
    """All operations over all axes that have more than one rank; the slowest rank's times."""
    rows = []
    for axis in AXES:
        group = getattr(runtime.groups, axis)
        if axis in ("dp_cp", "tp_cp") and group.size() in (_axis_size(runtime, a) for a in axis.split("_")):
            continue  # the same ranks as another axis
        if group.size() == 1:
            continue
        for size in kib or DEFAULT_KIB[runtime.device.type]:
            for operation in OPERATIONS:
                made = collective(operation, size << 10, group, runtime)
                seconds = _seconds(made.run, runtime, repeats)
                rows.append(
                    {
                        "axis": axis,
                        "ranks": group.size(),
                        "operation": operation,
                        "kib": size,
                        "seconds": seconds,
                        "bytes_per_second": made.sent / seconds,
                    }  # fmt: skip
                )
    return {
        "machine": {
            "device": _device_name(runtime),
            "torch": torch.__version__,
            "backend": _backend(runtime),
        },
        "layout": str(runtime.layout),
        "rows": rows,
        "calibration": calibration(rows, runtime),
    }


def _axis_size(runtime: Runtime, axis: str) -> int:
    return getattr(runtime.layout, axis)


def collective(operation: str, nbytes: int, group: dist.ProcessGroup, runtime: Runtime) -> Collective:
    """One collective over ``group`` with a whole tensor of about ``nbytes`` of fp32."""
    n = group.size()
    count = max(nbytes // 4 // n, 1)
    whole = torch.randn(n * count, device=runtime.device)
    part = torch.randn(count, device=runtime.device)
    fraction = (n - 1) / n * whole.numel() * 4
    if operation == "all_reduce":
        return Collective(lambda: dist.all_reduce(whole, group=group), 2 * fraction)
    if operation == "all_gather":
        return Collective(lambda: dist.all_gather_into_tensor(whole, part, group=group), fraction)
    if operation == "reduce_scatter":
        return Collective(lambda: dist.reduce_scatter_tensor(part, whole, group=group), fraction)
    received = torch.empty_like(whole)
    if operation == "all_to_all":
        return Collective(lambda: dist.all_to_all_single(received, whole, group=group), fraction)
    assert operation == "p2p", operation
    me = group.rank()
    after, before = (dist.get_global_rank(group, (me + step) % n) for step in (1, -1))

    def pass_on() -> None:
        if runtime.device.type == "cuda":
            pair = [
                dist.P2POp(dist.isend, whole, after, group),
                dist.P2POp(dist.irecv, received, before, group),
            ]
            waiting = dist.batch_isend_irecv(pair)
        else:
            waiting = [dist.isend(whole, after, group), dist.irecv(received, before, group)]
        for request in waiting:
            request.wait()

    return Collective(pass_on, whole.numel() * 4)


def _seconds(run: Callable[[], Any], runtime: Runtime, repeats: int) -> float:
    """Median over the runs of the slowest rank's seconds; all ranks begin together."""
    found = []
    for number in range(WARM_UP + repeats):
        dist.barrier()
        _wait(runtime)
        begin = time.perf_counter()
        run()
        _wait(runtime)
        if number >= WARM_UP:
            found.append(time.perf_counter() - begin)
    slowest = torch.tensor(found, dtype=torch.float64, device=runtime.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)


def calibration(rows: Sequence[dict[str, Any]], runtime: Runtime) -> dict[str, float]:
    """Fields of `plan/devices.py:Device`: rate of the largest and latency of the smallest tensor over all axes.

    Ranks of one node measure intra_bytes and collective_seconds, ranks of several inter_bytes and inter_seconds. On a
    CPU, where the planner slows links down by ranks per core, the values are those of one rank per core.
    """
    if not rows:
        return {}
    crowd = max(1.0, runtime.layout.world_size / cores()) if runtime.device.type == "cpu" else 1.0
    nodes = runtime.layout.world_size > _local_ranks(runtime)
    rate, latency = ("inter_bytes", "inter_seconds") if nodes else ("intra_bytes", "collective_seconds")
    largest, smallest = max(row["kib"] for row in rows), min(row["kib"] for row in rows)
    rings = [r for r in rows if r["operation"] in ("all_gather", "reduce_scatter", "all_reduce")]
    return {
        rate: crowd * statistics.median(r["bytes_per_second"] for r in rings if r["kib"] == largest),
        latency: statistics.median(r["seconds"] for r in rings if r["kib"] == smallest) / crowd,
        "transfer_seconds": statistics.median(
            r["seconds"] for r in rows if r["operation"] == "p2p" and r["kib"] == smallest
        )
        / crowd,
    }


def _local_ranks(runtime: Runtime) -> int:
    """Ranks on this node: with CUDA its devices, on a CPU all."""
    return torch.cuda.device_count() if runtime.device.type == "cuda" else runtime.layout.world_size


def _backend(runtime: Runtime) -> str:
    return "nccl" if runtime.device.type == "cuda" else "gloo"


def _device_name(runtime: Runtime) -> str:
    return (
        torch.cuda.get_device_name(runtime.device)
        if runtime.device.type == "cuda"
        else f"CPU, {cores()} cores"
    )


def report(record: dict[str, Any]) -> str:
    """The record for people."""
    machine = record["machine"]
    head = f"{machine['device']}, torch {machine['torch']}, {machine['backend']}: {record['layout']}"
    if not record["rows"]:
        return f"{head}\none rank: there is nothing to measure; use --nproc"
    rows = [("axis", "ranks", "operation", "KiB", "ms", "GB/s of a rank")]
    for row in record["rows"]:
        rows.append(
            (
                row["axis"],
                str(row["ranks"]),
                row["operation"],
                f"{row['kib']:,}",
                f"{row['seconds'] * 1e3:.3f}",
                f"{row['bytes_per_second'] / 1e9:.3f}",
            )  # fmt: skip
        )
    return f"{head}\n\n{table(rows)}"
