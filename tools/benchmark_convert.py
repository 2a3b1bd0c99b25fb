#!/usr/bin/env python3
"""Import and export of a random checkpoint against `cp`: speed, memory of all processes, disk use.

    benchmark_convert.py --work DIR                 the 10.17 B model: 20.3 GB, 45 GB of disk, some minutes
    benchmark_convert.py --work DIR --scale 50      a model of a fiftieth of its size, for a try

In one run: a random Hugging Face folder is made and its tensors' digests are kept; `cp` of its files followed by
fsync; `convert_checkpoint.py import --consume`; `export --consume`; the exported tensors against the digests. Each
timed step starts with its input out of the page cache. Anonymous and shared memory of all of a step's processes and
the disk use of DIR are sampled ten times a second. Exit code 0: equal, within 8 GiB and 45 GB, and no slower than half
of cp; 1: not so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

# A clone runs its own code, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.checkpoint.meter import held_bytes, table  # noqa: E402
from megatron_vl.config.model import ModelConfig  # noqa: E402
from megatron_vl.config.presets import STEP3_VL_10B  # noqa: E402
from megatron_vl.plan.cost import parameters  # noqa: E402

CONVERT = Path(__file__).resolve().with_name("convert_checkpoint.py")
MAX_MEMORY, MAX_DISK, MIN_SPEED = 8 * 2**30, 45_000_000_000, 0.5
SAMPLE_SECONDS = 0.1


@dataclass
class Step:
    """What one command took. nbytes: of the weights that it moved. memory, disk: peaks in bytes."""

    name: str
    seconds: float
    nbytes: int
    memory: int
    disk: int

    @property
    def rate(self) -> float:
        """MB/s, in units of 10^6 bytes."""
        return self.nbytes / 1e6 / self.seconds


class Sampler:
    """Peaks of memory (this process's children, anonymous plus shared) and of the disk use below a folder."""

    def __init__(self, folder: Path) -> None:
        self.memory = self.disk = 0
        self._folder, self._end = folder, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._end.wait(SAMPLE_SECONDS):
            processes = me.children(recursive=True)
            self.memory = max(self.memory, sum(held_bytes(str(child.pid)) for child in processes))
            self.disk = max(self.disk, disk_use(self._folder))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()
        self.disk = max(self.disk, disk_use(self._folder))


def disk_use(folder: Path) -> int:
    """Bytes of disk that the files below a folder take; files that vanish meanwhile do not count."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def scaled(scale: float) -> ModelConfig:
    """The 10B model with about 1 / scale of its parameters: widths and depths shrink by the cube root."""
    if scale <= 1:
        return STEP3_VL_10B
    by = scale ** (1 / 3)
    vision, text = STEP3_VL_10B.vision, STEP3_VL_10B.text

    def less(size: int, multiple: int, power: int = 1) -> int:
        return max(multiple, round(size / by**power / multiple) * multiple)

    return ModelConfig(
        vision=replace(
            vision,
            hidden_size=less(vision.hidden_size, 64),
            num_layers=less(vision.num_layers, 1),
            ffn_hidden_size=less(vision.ffn_hidden_size, 64),
        ),
        text=replace(
            text,
            hidden_size=less(text.hidden_size, 128),
            num_attention_heads=less(text.num_attention_heads, text.num_query_groups),
            num_layers=less(text.num_layers, 1),
            ffn_hidden_size=less(text.ffn_hidden_size, 128),
            vocab_size=less(text.vocab_size, 64, power=2),
        ),
    )


def run_step(name: str, work: Path, nbytes: int, command: Callable[[], None]) -> Step:
    with Sampler(work) as sampler:
        started = time.perf_counter()
        command()
        seconds = time.perf_counter() - started
    step = Step(name, seconds, nbytes, sampler.memory, sampler.disk)
    print(f"{name}: {seconds:.1f} s, {step.rate:.0f} MB/s, {step.memory / 2**30:.2f} GiB", file=sys.stderr)
    return step


def convert(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, str(CONVERT), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL
    )


def copy_and_sync(source: Path, target: Path) -> None:
    target.mkdir()
    subprocess.run(["cp", *sorted(map(str, source.glob("*.safetensors"))), str(target)], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(work: Path, model: ModelConfig, threads: int, shard_gb: float) -> list[Step]:
    """The steps in order; everything they write lies below ``work``."""
    nbytes = 2 * parameters(model)["total"]
    hf, copy, checkpoint, back, digests = (
        work / name for name in ("hf", "copy", "ck", "back", "made.digests.json")
    )
    settings = [f"--set=model.{part}.{key}={value}" for part in ("vision", "text")
                for key, value in asdict(getattr(model, part)).items()]  # fmt: skip
    common = ("--threads", threads)
    make = ("inspect", "--make-random", hf, "--preset", "step3_vl_10b", *settings, "--digests", digests)
    steps = [run_step("make", work, nbytes, lambda: convert(*make, "--shard-gb", shard_gb, *common))]
    forget(hf)
    steps.append(run_step("cp + fsync", work, nbytes, lambda: copy_and_sync(hf, copy)))
    shutil.rmtree(copy)
    forget(hf)
    arguments = ("import", "--hf", hf, "--out", checkpoint, "--consume", *common)
    steps.append(run_step("import", work, nbytes, lambda: convert(*arguments)))
    forget(checkpoint)
    back_again = (
        "export",
        "--checkpoint",
        checkpoint,
        "--out",
        back,
        "--consume",
        "--shard-gb",
        shard_gb,
        *common,
    )
    steps.append(run_step("export", work, nbytes, lambda: convert(*back_again)))
    forget(back)
    steps.append(run_step("verify", work, nbytes, lambda: convert("verify", back, digests, *common)))
    return steps


def judge(steps: list[Step], full_size: bool) -> list[str]:
    """What is not as it must be. Speed counts at full size only: starting a process takes a second or two."""
    found = {step.name: step for step in steps}
    problems = []
    for name in ("import", "export"):
        step, ratio = found[name], found[name].rate / found["cp + fsync"].rate
        if step.memory > MAX_MEMORY:
            problems.append(f"{name} took {step.memory / 2**30:.2f} GiB, at most 8 are allowed")
        if step.disk > MAX_DISK:
            problems.append(f"{name} took {step.disk / 1e9:.1f} GB of disk, at most 45 are allowed")
        if full_size and ratio < MIN_SPEED:
            problems.append(
                f"{name} ran at {ratio:.2f} of the speed of cp, at least {MIN_SPEED} is asked for"
            )
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    parser.add_argument("--scale", type=float, default=1.0, help="how many times smaller than the 10B model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shard-gb", type=float, default=4.29, help="largest file; 4.29 as in the release")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="convert_", dir=options.work))
    model = scaled(options.scale)
    try:
        steps = measure(work, model, options.threads, options.shard_gb)
    except subprocess.CalledProcessError as error:
        print(f"benchmark_convert.py: failed: {' '.join(map(str, error.cmd[1:]))}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    copied = next(step for step in steps if step.name == "cp + fsync")
    rows = [("step", "GB", "seconds", "MB/s", "of cp", "peak GiB", "disk GB")]
    for step in steps:
        cells = (
            f"{step.nbytes / 1e9:.2f}",
            f"{step.seconds:.1f}",
            f"{step.rate:.0f}",
            f"{step.rate / copied.rate:.2f}",
            f"{step.memory / 2**30:.2f}",
            f"{step.disk / 1e9:.2f}",
        )
        rows.append((step.name, *cells))
    problems = judge(steps, options.scale <= 1)
    figures = {
        "parameters": parameters(model)["total"],
        "cores": os.cpu_count(),
        "threads": options.threads,
        "steps": [asdict(step) | {"mb_per_second": step.rate} for step in steps],
        "problems": problems,
    }
    print(table(rows))
    print(json.dumps(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    for problem in problems:
        print(f"not as it must be: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
