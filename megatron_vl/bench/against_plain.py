"""`step --against-plain`: the trainer's step and the same maths in plain PyTorch, in turns in one process, on CPU.

Both start from the same weights and take the same rows; their losses must be equal before anything is timed. Judged
is processor time, which other work on the machine changes less than the clock, and of each turn its ratio.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_vl.bench.plain_model import PlainModel, make_optimizer
from megatron_vl.bench.quick_weights import QuickWeights
from megatron_vl.bench.step_report import spread
from megatron_vl.bench.synthetic import micro_batches, shape_of
from megatron_vl.checkpoint.meter import table
from megatron_vl.config.load import LoadedRun
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.batch import MicroBatch
from megatron_vl.errors import ConfigError
from megatron_vl.parallel import cpu
from megatron_vl.plan.layout import Layout
from megatron_vl.train.build import build
from megatron_vl.train.pretrain import on_rank
from megatron_vl.train.step import train_step

EQUAL = 1e-5  # relative difference of losses, fp32
ASKED = 1.25  # times the plain step
LEARNING_RATE = 1e-4


def compare(loaded: LoadedRun, options: argparse.Namespace) -> tuple[str, dict[str, Any], bool]:
    """(report, record, losses are equal). Raises ConfigError for what the plain model has not: see `check`."""
    config = loaded.config
    check(config, options.nproc)
    outcome: list[tuple[str, dict[str, Any], bool]] = []

    def work(runtime, phase, stop) -> None:
        torch.set_num_threads(1)
        parts = build(config, runtime, QuickWeights(config.model, config.train.seed))
        shape = shape_of(config, runtime.layout, options.visual_share)
        batches = micro_batches(config, runtime.layout, 0, shape)
        ours = lambda: train_step(parts, batches, LEARNING_RATE).loss  # noqa: E731
        plain = plain_step(config, batches)
        record = in_turns(ours, plain, options.warmup, options.steps)
        tokens = config.train.global_batch_size * config.data.seq_length
        record |= {"tokens": tokens, "data": shape.describe(config.model), "adapter": adapter_share(ours)}
        record["torch"] = torch.__version__
        outcome.append((report(record), record, record["loss_difference"] <= EQUAL))

    on_rank(config, Layout.from_config(config.parallel, 1), work)
    return outcome[0]


def check(config: RunConfig, ranks: int) -> None:
    """The plain model is one rank in fp32 with dense rows, nothing frozen, one learning rate."""
    model, optim = config.model, config.optim
    frozen = model.freeze_vision or model.freeze_projector or model.freeze_decoder
    scaled = (optim.vision_lr_scale, optim.projector_lr_scale) != (1.0, 1.0)
    wrong = {
        "--nproc": ranks != 1 or config.parallel.model_parallel_size != 1,
        "data.packing.enabled": config.data.packing.enabled,
        "model.freeze_*": frozen,
        "precision.params": config.precision.params == "bf16",
        "optim.*_lr_scale": scaled,
        "parallel.device": config.parallel.device == "cuda",
    }
    if any(wrong.values()):
        names = ", ".join(name for name, bad in wrong.items() if bad)
        raise ConfigError(
            f"--against-plain: {names}: the plain model is one CPU rank in fp32 with dense rows, nothing frozen and "
            "one learning rate; change these keys"
        )


def plain_step(config: RunConfig, batches: Sequence[MicroBatch]) -> Callable[[], float]:
    """A function that takes one step of the plain model and returns its loss."""
    model = PlainModel(config.model).take(QuickWeights(config.model, config.train.seed))
    optim = config.optim
    optimizer = make_optimizer(
        model, LEARNING_RATE, (optim.adam_beta1, optim.adam_beta2), optim.adam_eps, optim.weight_decay
    )
    scored = sum(batch.num_loss_tokens for batch in batches)

    def take() -> float:
        total = 0.0
        optimizer.zero_grad()
        for b in batches:
            loss = model(b.input_ids, b.labels, b.view_kinds, b.crop_pixels, b.global_pixels)
            loss = loss * (b.num_loss_tokens / scored)
            loss.backward()
            total += loss.item()
        if optim.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()
        return total

    return take


def in_turns(
    ours: Callable[[], float], plain: Callable[[], float], warmup: int, steps: int
) -> dict[str, Any]:
    """Times and losses of both, one step of each after the other, who is first changing from turn to turn."""
    ways = {"ours": ours, "plain": plain}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + steps):
        for name in ways if turn % 2 else reversed(ways):
            begin, own = time.perf_counter(), time.process_time()
            losses[name].append(ways[name]())
            own, seconds = time.process_time() - own, time.perf_counter() - begin
            if turn >= warmup:
                processor[name].append(own)
                wall[name].append(seconds)
    ratios = [one / other for one, other in zip(processor["ours"], processor["plain"])]
    off = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["plain"]))
    return {
        "processor_seconds": {name: spread(values) for name, values in processor.items()},
        "wall_seconds": {name: spread(values) for name, values in wall.items()},
        "ratio": spread(ratios),
        "ratio_of_the_least": min(processor["ours"]) / min(processor["plain"]),
        "first_losses": {name: values[0] for name, values in losses.items()},
        "loss_difference": off,
        "turns": steps,
    }


def adapter_share(take: Callable[[], Any]) -> dict[str, float]:
    """What parallel/cpu.py's replacements take of a step: calls, and at most this share of the time.

    cProfile counts the replacements' own seconds, without the functions that they stand for. It slows Python calls
    down and operations not, so that the share is an upper bound.
    """
    profiler = cProfile.Profile()
    profiler.runcall(take)
    stats = pstats.Stats(profiler).stats
    mine = [value for (file, _, _), value in stats.items() if file == cpu.__file__]
    total = sum(value[2] for value in stats.values())
    return {"calls": sum(value[1] for value in mine), "share": sum(value[2] for value in mine) / total}


def report(record: dict[str, Any]) -> str:
    """The record for people."""
    rows = [("", "processor s", "min", "max", "wall s", "loss of step 1")]
    for name in ("ours", "plain"):
        own, wall = record["processor_seconds"][name], record["wall_seconds"][name]
        times = (f"{own[key]:.4f}" for key in ("median", "min", "max"))
        rows.append((name, *times, f"{wall['median']:.4f}", f"{record['first_losses'][name]:.7f}"))
    ratio, adapter = record["ratio"], record["adapter"]
    return "\n".join(
        [
            f"one CPU rank, one thread, fp32, torch {record['torch']}, {record['tokens']:,} tokens a step",
            f"data: {record['data']}",
            "",
            table(rows),
            "",
            f"ours / plain {ratio['median']:.3f} (min {ratio['min']:.3f}, max {ratio['max']:.3f}) over "
            f"{record['turns']} turns, of the least of each {record['ratio_of_the_least']:.3f}; asked for: {ASKED}",
            f"losses differ by {record['loss_difference']:.1e} at most (relative; bound {EQUAL:.0e})",
            f"parallel/cpu.py: {adapter['calls']:,} calls a step, at most {adapter['share']:.2%} of its time",
        ]
    )
