"""What one rank of `benchmark_throughput.py step` does: build, warm up, take steps, put the ranks' times together."""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_vl.bench.largest import traced
from megatron_vl.bench.phases import Clock, split, timed_parts
from megatron_vl.bench.quick_weights import QuickWeights
from megatron_vl.bench.step_report import Measured, record_of, report
from megatron_vl.bench.synthetic import micro_batches, shape_of
from megatron_vl.config.load import LoadedRun
from megatron_vl.data.batch import MicroBatch
from megatron_vl.optim.schedule import learning_rate
from megatron_vl.parallel.heartbeat import Phase
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.plan.budget import tokens_per_step
from megatron_vl.train import step as trainer
from megatron_vl.train.boundary import next_batches
from megatron_vl.train.build import Parts, build
from megatron_vl.train.metrics import Meter
from megatron_vl.train.prepare import first_weights, prepare

LEARNING_RATE = 1e-5  # of a run that has no schedule


class MadeUp:
    """The same synthetic micro-batches every step."""

    def __init__(
        self, loaded: LoadedRun, runtime: Runtime, phase: Phase, options: argparse.Namespace
    ) -> None:
        config = loaded.config
        phase.enter("building the model")
        given = config.train.init_from_hf is not None or config.train.init_from is not None
        quick = QuickWeights(config.model, config.train.seed)
        self.parts = build(config, runtime, first_weights(config, None, runtime).source if given else quick)
        shape = shape_of(config, runtime.layout, options.visual_share, options.document_tokens)
        self.batches = micro_batches(config, runtime.layout, runtime.rank, shape)
        self.meter = Meter(config, runtime, config.train.train_steps)
        self.about = shape.describe(config.model)

    def next(self, number: int) -> list[MicroBatch]:
        """The batches of step ``number``."""
        return self.batches

    def close(self) -> None:
        """There is nothing to end."""


class OwnData:
    """The run's own data, through its loader."""

    def __init__(self, loaded: LoadedRun, runtime: Runtime, phase: Phase) -> None:
        self.run = prepare(loaded, runtime, phase)
        self.run.feed.loader.seek(0)
        self.parts, self.meter = self.run.parts, self.run.meter
        self.about = "the run's own data"

    def next(self, number: int) -> list[MicroBatch]:
        """Load and settle the batches of step ``number``."""
        batches = next_batches(self.run, self.run.feed, "loading data", number)
        assert batches is not None, "a request to stop ends a benchmark at once"
        return batches

    def close(self) -> None:
        """End the loading processes."""
        self.run.close()


def measure(
    loaded: LoadedRun, own_data: bool, runtime: Runtime, phase: Phase, options: argparse.Namespace
) -> tuple[str, dict[str, Any], bool]:
    """(report, record, losses are finite) on rank 0, and a report without text elsewhere."""
    source = OwnData(loaded, runtime, phase) if own_data else MadeUp(loaded, runtime, phase, options)
    try:
        clock = Clock(runtime.device)
        with timed_parts(source.parts, clock) as towers:
            measured = Measured()
            for number in range(options.warmup + options.steps):
                own = time.process_time()
                metrics, phases = _step(source, clock, towers, phase, number)
                if number >= options.warmup:
                    measured.steps.append(metrics)
                    measured.phases.append(phases)
                    measured.processor.append(time.process_time() - own)
        largest = None
        if options.trace:
            batches = source.next(options.warmup + options.steps + 1)
            take = _taker(source.parts, batches)
            largest = traced(
                take, options.trace, runtime.device, write=runtime.rank == 0 or options.fake_world
            )
        everyone = _everyone(measured.medians(), runtime, bool(options.fake_world))
    finally:
        source.close()
    record = record_of(
        loaded.config, runtime, measured, everyone, source.about, source.meter.peak, _machine(runtime)
    )
    if options.fake_world:
        record["fake"] = (
            f"rank {options.fake_rank} of {options.fake_world} alone: no communication, losses mean nothing"
        )
    if largest:
        record["largest"] = largest
    good = bool(options.fake_world) or all(math.isfinite(m.loss) for m in measured.steps)
    return (report(record) if runtime.rank == 0 or options.fake_world else ""), record, good


def _step(source: MadeUp | OwnData, clock: Clock, towers: Sequence, phase: Phase, number: int):
    """One step: what the log would say of it, and its phases."""
    parts = source.parts
    config = parts.config
    begin = time.perf_counter()
    batches = source.next(number + 1)
    waited = time.perf_counter() - begin
    phase.enter("training", number + 1, limit=config.parallel.timeout_seconds)
    result = trainer.train_step(parts, batches, _rate(parts), phase.tick)
    for tower in towers:
        tower.close()
    found = clock.take()
    seconds = time.perf_counter() - begin
    phase.enter("measuring", limit=config.parallel.timeout_seconds)
    tokens = (number + 1) * tokens_per_step(config)
    metrics = source.meter.measure(number + 1, tokens, 0.0, result, batches, seconds, waited, 0, 0)
    return metrics, split(found | {"data": waited}, seconds)


def _rate(parts: Parts) -> float:
    schedule = parts.config.schedule
    return learning_rate(schedule, schedule.warmup_tokens) if schedule.phases else LEARNING_RATE


def _taker(parts: Parts, batches: Sequence[MicroBatch]) -> Callable[[], Any]:
    return lambda: trainer.train_step(parts, batches, _rate(parts))


def _everyone(mine: dict[str, float], runtime: Runtime, alone: bool) -> list[dict[str, float]]:
    """The median phases of every rank."""
    if alone:
        return [mine]
    found: list[dict[str, float]] = [{}] * runtime.layout.world_size
    dist.all_gather_object(found, mine)
    return found


def _machine(runtime: Runtime) -> dict[str, Any]:
    cuda = runtime.device.type == "cuda"
    name = torch.cuda.get_device_name(runtime.device) if cuda else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
