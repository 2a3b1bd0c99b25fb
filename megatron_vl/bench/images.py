"""`benchmark_throughput.py images`: from a JPEG in memory to the views of the model, on one core and one thread.

The reference (`reference_views.py`) and every mode and back end run in turns, so that other load on the machine hits
all alike; judged is processor time, and of each turn its ratio to the reference in that turn. In mode fast the model
normalises on its device; what that costs on this CPU is a column of its own and not part of the rate.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_vl.bench.pictures import jpeg, photo_like
from megatron_vl.bench.reference_views import STD, decoded, in_8_bits, in_float
from megatron_vl.checkpoint.meter import table
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.crops import CropPlan, plan_crops
from megatron_vl.data.decode import resize_whole, stretch_to_canvas
from megatron_vl.data.image_backend import ImageBackend, image_backend
from megatron_vl.ops.pixels import normalised
from megatron_vl.plan.image_checks import dali_is_installed

HELP = "decode, resize and normalise images, against the released preprocessing"
SIZES = ("1024x768", "1920x1080", "4000x3000")
LEVELS = {"exact": 0.01, "fast": 2.2}  # largest difference from the reference, in grey levels of 255
ASKED = {"exact": 1.0, "fast": 2.0}  # times the reference
Views = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Way:
    """One way of making views. backend None: the reference. seconds: per part, (wall, processor) of each turn."""

    name: str
    backend: ImageBackend | None = None
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """`exact` or `fast`."""
        return self.backend.mode if self.backend else "exact"

    def views(self, data: bytes, plan: CropPlan) -> Views:
        """Everything: header, decoding, resizes, crops, in mode exact also normalising."""
        if self.backend is None:
            return in_float(in_8_bits(decoded(data), plan), 728, 504)
        return self.backend.views(data, self.backend.plan(self.backend.header(data).size))

    def turn(self, data: bytes, plan: CropPlan, keep: bool) -> None:
        """Runs and times the whole and its parts once. keep: whether it counts, or was to warm up."""
        found = {}
        views, found["all"] = timed(lambda: self.views(data, plan))
        if self.backend is None:
            rgb, found["decode"] = timed(lambda: decoded(data))
            _, found["resize"] = timed(lambda: in_8_bits(rgb, plan))
        elif self.mode == "exact":
            rgb, found["decode"] = timed(lambda: self.backend.picture(data))
            _, found["resize"] = timed(lambda: _two_resizes(rgb, plan))
        else:
            _, found["decode"] = timed(lambda: self.backend.pixels(data))
            _, found["device"] = timed(lambda: [normalised(pixels, torch.float32) for pixels in views])
        for part, seconds in found.items() if keep else ():
            self.seconds.setdefault(part, []).append(seconds)

    def rest(self) -> list[float]:
        """Processor seconds of each turn that no part accounts for: float work, in mode fast 8-bit resizes."""
        parts = [self.seconds[part] for part in ("decode", "resize") if part in self.seconds]
        return [
            max(whole - sum(part[turn][1] for part in parts), 0.0)
            for turn, (_, whole) in enumerate(self.seconds["all"])
        ]


def _two_resizes(rgb: Any, plan: CropPlan) -> None:
    resized = resize_whole(rgb, plan)
    if plan.canvas is not None:
        stretch_to_canvas(resized, plan)


def timed(run: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """The result, and seconds: by the clock, and of all threads of this process on a processor."""
    wall, processor = time.perf_counter(), time.process_time()
    result = run()
    return result, (time.perf_counter() - wall, time.process_time() - processor)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WxH", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, help="turns before (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default: %(default)s)")
    parser.add_argument("--require", action="store_true", help="fail where a rate is below what is asked for")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any], bool]:
    """The report, the same as a record, and whether pixels (with --require: also rates) are as they should be."""
    torch.set_num_threads(1)
    sizes = [tuple(int(side) for side in size.split("x")) for size in options.sizes]
    results = [measure(size, options) for size in sizes]
    record = {
        "machine": {"processor": _processor(), "torch": torch.__version__, "threads": 1},
        "dali": "installed" if dali_is_installed() else "not installed: its rows are missing",
        "sizes": results,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    rows = [row for result in results for row in result["rows"]]
    good = all(row["within"] and (row["fast_enough"] or not options.require) for row in rows)
    return report(record), record, good


def measure(size: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    """All ways at one size, in turns."""
    data, plan = jpeg(photo_like(*size), options.quality), plan_crops(*size)
    ways = ways_here()
    for turn in range(options.warm_up + options.repeats):
        for way in ways:
            way.turn(data, plan, keep=turn >= options.warm_up)
    reference, rows = ways[0], []
    expected = reference.views(data, plan)
    for way in ways:
        levels = farthest(way.views(data, plan), expected)
        ratios = [one / other for (_, one), (_, other) in zip(reference.seconds["all"], way.seconds["all"])]
        rows.append(
            {
                "way": way.name,
                "images_per_processor_second": spread([1 / cpu for _, cpu in way.seconds["all"]]),
                "images_per_second": spread([1 / wall for wall, _ in way.seconds["all"]]),
                "times_the_reference": spread(ratios),
                "milliseconds": {
                    part: round(1000 * statistics.median(cpu for _, cpu in way.seconds[part]), 2)
                    for part in ("decode", "resize", "device")
                    if part in way.seconds
                }
                | {"rest": round(1000 * statistics.median(way.rest()), 2)},
                "levels_off": round(levels, 4),
                "within": levels <= LEVELS[way.mode],
                "fast_enough": way.backend is None or statistics.median(ratios) >= ASKED[way.mode],
            }
        )
    pixels = size[0] * size[1]
    return {
        "size": "x".join(map(str, size)),
        "crops": plan.num_crops,
        "bits_per_pixel": round(8 * len(data) / pixels, 2),
        "rows": rows,
    }


def ways_here() -> list[Way]:
    """The reference, and each mode of each back end that this machine has."""
    names = ["torch", "dali"] if dali_is_installed() else ["torch"]
    ways = [Way("reference")]
    for mode in ("exact", "fast"):
        for name in names:
            data = DataConfig(image_mode=mode, image_backend=name, dali_device="cpu")
            ways.append(Way(f"{mode} {name}", image_backend(data, ModelConfig())))
    return ways


def farthest(views: Views, expected: Views) -> float:
    """Largest difference of a pixel from the reference, in grey levels."""
    most = 0.0
    for ours, theirs in zip(views, expected, strict=True):
        for view, other in zip(ours, theirs, strict=True):  # one at a time: 30 crops in float are 180 MB
            off = (normalised(view[None], torch.float32)[0] - other) * STD * 255
            most = max(most, off.abs().max().item())
    return most


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in named.items()}


def report(record: dict[str, Any]) -> str:
    """The record as text: one table per size."""
    machine = record["machine"]
    parts = [f"{machine['processor']}, one thread, torch {machine['torch']}; DALI {record['dali']}"]
    for result in record["sizes"]:
        parts.append(
            f"\n{result['size']}, {result['crops']} crops, JPEG of {result['bits_per_pixel']} bits/pixel"
        )
        rows = [
            ("", "images/s", "min", "max", "x ref", "ms: decode", "8-bit", "float", "on device", "levels off")
        ]
        for row in result["rows"]:
            rate, ms = row["images_per_processor_second"], row["milliseconds"]
            in_bytes = "device" in ms  # mode fast: what is left after decoding is 8-bit work
            rows.append(
                (
                    row["way"],
                    *(f"{rate[name]:.2f}" for name in ("median", "min", "max")),
                    f"{row['times_the_reference']['median']:.2f}",
                    f"{ms['decode']:.1f}",
                    f"{ms['rest'] if in_bytes else ms['resize']:.1f}",
                    "" if in_bytes else f"{ms['rest']:.1f}",
                    f"{ms['device']:.1f}" if in_bytes else "",
                    f"{row['levels_off']:.2f}",
                )
            )
        parts.append(table(rows))
    parts.append(
        "\nimages/s and ms: processor time, medians of the turns; x ref: median over the turns. The reference and "
        "exact normalise in `float`;\nfor fast the model does, `on device`: here on this CPU, and not part of images/s."
    )
    return "\n".join(parts)


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
