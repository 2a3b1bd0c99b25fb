"""What a step did, for the console and metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.batch import MicroBatch
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.plan.budget import tokens_per_step
from megatron_vl.plan.cost import peak_flops, sample_flops, tower_and_decoder, train_flops, view_costs
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.row_work import WorkRates
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_step
from megatron_vl.train.step import StepResult


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Times in s, memory in bytes, rates over the whole step.

    tokens: consumed row tokens (padding included), which drive the schedule. text_tokens: real tokens of this
    step. loss, grad_norm: null in the file when not finite. skipped_steps: how many such steps there were up to now.
    tokens_per_second_per_gpu counts real tokens. model_tflops: model FLOPs (tower included, no recomputation) per
    second and rank. mfu: of the device's dense peak, on CPU of the GEMM rate measured at start. rows_filled: share of
    the row tokens that are real. vision_balance: FLOPs of the tower that the slowest replica waits for, micro-batch by
    micro-batch (placement all: once a step) those of its busiest rank, over the mean of all ranks with the tower.
    work_balance: all FLOPs of the data-parallel rank that has most, over their mean.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    text_tokens: int
    loss_tokens: int
    step_seconds: float
    data_wait_seconds: float
    tokens_per_second_per_gpu: float
    model_tflops: float
    mfu: float
    tower_share: float
    rows_filled: float
    vision_balance: float
    work_balance: float
    images: int
    crops: int
    views_of_a_replica_min: int
    views_of_a_replica_max: int
    memory_bytes: int
    bad_samples: int
    skipped_steps: int
    eta_seconds: float


class Meter:
    """Turns steps into metrics, alike on every rank (one reduction per step)."""

    def __init__(self, config: RunConfig, runtime: Runtime, total_steps: int) -> None:
        self.config, self.runtime, self.total_steps = config, runtime, total_steps
        self.peak = device_peak(runtime)
        self._recent: list[float] = []

    def measure(
        self, step: int, tokens: int, lr: float, result: StepResult, batches: Sequence[MicroBatch],
        seconds: float, waited: float, bad_samples: int, skipped_steps: int,
    ) -> StepMetrics:  # fmt: skip
        """Metrics of step number ``step`` (from 1). Every rank calls it."""
        tower, decoder = step_flops(self.config, batches)
        counts = [
            sum(b.num_tokens for b in batches),
            sum(b.num_images for b in batches),
            sum(b.num_crops for b in batches),
        ]
        sums = torch.tensor([tower, decoder, *counts], dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(sums, group=self.runtime.groups.dp)
        views = counts[1] + counts[2]
        busiest = busiest_tower_flops(self.config, self.runtime.layout, batches)
        worst = torch.tensor(
            [waited, memory_in_use(self.runtime.device), seconds, views, -views, busiest, tower + decoder],
            dtype=torch.float64, device=self.runtime.device,
        )  # fmt: skip
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        tower, decoder, text_tokens, images, crops = sums.tolist()
        waited, memory, seconds, most_views, fewest_views, busiest, most_work = worst.tolist()
        self._recent = [*self._recent[-19:], seconds]
        ranks, dp = self.runtime.layout.world_size, self.runtime.layout.dp
        rate = (tower + decoder) / seconds / ranks
        return StepMetrics(
            step=step, loss=result.loss, grad_norm=result.grad_norm, lr=lr, tokens=tokens,
            text_tokens=int(text_tokens), loss_tokens=result.tokens, step_seconds=seconds, data_wait_seconds=waited,
            tokens_per_second_per_gpu=text_tokens / seconds / ranks, model_tflops=rate / 1e12, mfu=rate / self.peak,
            tower_share=tower / max(tower + decoder, 1.0),
            rows_filled=text_tokens / tokens_per_step(self.config),
            vision_balance=busiest * dp * self.runtime.layout.vision_size / tower if tower else 1.0,
            work_balance=most_work * dp / (tower + decoder) if tower + decoder else 1.0,
            images=int(images), crops=int(crops),
            views_of_a_replica_min=-int(fewest_views), views_of_a_replica_max=int(most_views),
            memory_bytes=int(memory), bad_samples=bad_samples, skipped_steps=skipped_steps,
            eta_seconds=(self.total_steps - step) * sorted(self._recent)[len(self._recent) // 2],
        )  # fmt: skip


def step_flops(config: RunConfig, batches: Sequence[MicroBatch]) -> tuple[float, float]:
    """Model FLOPs (tower, decoder) of one replica's step: documents and views as they are, no padding."""
    totals = [0.0, 0.0]
    for batch in batches:
        forward = sample_flops(config.model, batch.view_kinds, batch.doc_lengths)
        for i, part in enumerate(tower_and_decoder(train_flops(config.model, forward))):
            totals[i] += part
    return totals[0], totals[1]


def busiest_tower_flops(config: RunConfig, layout: Layout, batches: Sequence[MicroBatch]) -> float:
    """Model FLOPs of the tower on the rank that has most of each micro-batch, added up over the micro-batches.

    The exchange of features makes the ranks of a replica wait for each other in every micro-batch; in placement `all`
    once a step, so that there it is the rank that has most of the step.
    """
    rates, kinds = WorkRates.of(config.model), [batch.view_kinds for batch in batches]
    shares = share_step(kinds, layout.vision_size, view_costs(config.model), layout.tower_beside)
    work = []
    for of_batch, of_ranks in zip(kinds, shares):
        mine = [[of_batch[view] for view in share] for share in of_ranks]
        work.append([rates.vision(found.count(GLOBAL), found.count(CROP)) for found in mine])
    if layout.tower_beside:
        return float(max(map(sum, zip(*work))))
    return float(sum(map(max, work)))


def memory_in_use(device: torch.device) -> int:
    """Bytes: peak allocation on CUDA, resident size of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def device_peak(runtime: Runtime) -> float:
    """FLOP/s of one rank that MFU is a share of: the data sheet's on CUDA, a measured product on CPU.

    On a CUDA device that plan/cost.py does not list, the product is measured as well. All ranks measure at once,
    since they share the machine.
    """
    if runtime.device.type == "cuda":
        listed = peak_flops(torch.cuda.get_device_name(runtime.device))
        if listed:
            return listed
    return measured_gemm_rate(runtime, *measured_product(runtime.device.type))


def measured_product(device_type: str) -> tuple[int, torch.dtype]:
    """Rows and columns, and format, of the product that stands for a device's peak: one that fills a GPU, in the
    format of its fast units."""
    return (8192, torch.bfloat16) if device_type == "cuda" else (512, torch.float32)


def measured_gemm_rate(runtime: Runtime, size: int, dtype: torch.dtype, repeats: int = 8) -> float:
    """Best of ``repeats`` square matrix products on every rank at once, averaged over ranks, FLOP/s."""
    a = torch.randn(size, size, device=runtime.device).to(dtype)
    dist.barrier()
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for all of it
        best = min(best, time.perf_counter() - begin)
    rate = torch.tensor([2.0 * size**3 / best], dtype=torch.float64, device=runtime.device)
    dist.all_reduce(rate)
    return rate.item() / runtime.layout.world_size


class StepLines:
    """A JSON-lines file of the run folder with one object per line and its ``step``; only one rank writes.

    Opened by a resumed run it loses the lines of steps that come again, and a last line that a kill cut off.
    """

    def __init__(self, path: Path, from_step: int) -> None:
        self.path, self._complained = path, False
        if path.exists():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= from_step]
            aside = path.with_name(path.name + ".tmp")
            aside.write_text("".join(kept))
            os.replace(aside, path)

    def write(self, record: StepMetrics | dict) -> None:
        """Append one record; strict JSON, so numbers that are not finite become null."""
        record = record if isinstance(record, dict) else asdict(record)
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except (
            OSError
        ) as error:  # the run goes on: its checkpoints matter more, and saving says what is wrong
            if not self._complained:
                self._complained = True
                print(
                    f"{self.path} cannot be written ({error}); training goes on", file=sys.stderr, flush=True
                )


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a power cut has spoilt."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class MetricsFile(StepLines):
    """metrics.jsonl."""

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation after ``step`` is there."""
        if not self.path.exists():
            return False
        records = map(json.loads, self.path.read_text().splitlines())
        return any(r["step"] == step and "eval_loss" in r for r in records)
