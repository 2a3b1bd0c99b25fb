"""Step time of tower placements in one pipelined layout, in turns, with the same batch.

Four ranks on fewer cores take each other's time, and no placement can be faster than all work over all cores. So the
processor seconds of the busiest rank are measured too: below these no step can get, however many cores there are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.config.model import ModelConfig, TextConfig, VisionConfig
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import DataConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from megatron_vl.data.batch import MicroBatch, Row, collate
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parallel.world import LocalWorld
from megatron_vl.plan.cost import sample_flops, tower_and_decoder, train_flops
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.shares import views_of_rank
from megatron_vl.plan.stages import balanced_layers
from megatron_vl.plan.step_time import pipeline_seconds
from megatron_vl.plan.vision_share import CROP, GLOBAL
from megatron_vl.train.build import build
from megatron_vl.train.step import train_step

HELP = "step time of the tower placements in a pipeline, in turns (CPU, local ranks)"
IMAGE = (*[CROP] * 12, GLOBAL)
# A visual token costs the tower as much as 4.5 tokens cost the decoder's layers, as in the released model.
MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=224, crop_size=112, patch_size=14, hidden_size=192, num_layers=8, num_attention_heads=6,
        ffn_hidden_size=768,
    ),
    text=TextConfig(
        hidden_size=384, num_layers=8, num_attention_heads=6, num_query_groups=2, kv_channels=64,
        ffn_hidden_size=1024, vocab_size=512,
    ),
    tokens=STEP3_VL_TINY.tokens,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--placements", default="data,all", help="default: %(default)s")
    parser.add_argument("--pp", type=int, default=4, help="pipeline ranks (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step (default: %(default)s)")
    parser.add_argument(
        "--visual-share", type=float, default=0.25, help="part of a row's 256 tokens (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=5, help="of each placement (default: %(default)s)")


@dataclass(frozen=True)
class Taken:
    """Of one rank: wall and processor seconds of each step, and the losses."""

    wall: list[float]
    own: list[float]
    losses: list[float]


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any], bool]:
    """The report, the same as a record, and whether all placements gave the same losses."""
    names = options.placements.split(",")
    configs = {name: described(options, name) for name in names}
    images = visual_images(options.visual_share)
    found: dict[str, list[Taken]] = {}
    with LocalWorld(options.pp) as world:
        for _ in range(2):  # in turns, twice: what else the machine does meets all of them
            for name, config in configs.items():
                taken = world.run(options.pp, steps_on_rank, config, images, options.steps)
                before = found.get(name, [Taken([], [], []) for _ in taken])
                found[name] = [
                    Taken(a.wall + b.wall, a.own + b.own, a.losses + b.losses) for a, b in zip(before, taken)
                ]
    record = {name: summary(of_ranks) for name, of_ranks in found.items()}
    for name, config in configs.items():
        record[name]["work_alone"] = work_alone(config, images, options.pp)
    losses = [record[name].pop("losses") for name in names]
    good = all(np.allclose(one, losses[0], rtol=1e-5) for one in losses)
    whole = {"pp": options.pp, "cores": len(os.sched_getaffinity(0)), "micro_batches": options.micro_batches}
    whole |= {"tower_share": tower_share(configs[names[0]], images), "visual_tokens": images * image_tokens()}
    return report(record, whole, good), whole | {"placements": record, "losses_equal": good}, good


def described(options: argparse.Namespace, placement: str) -> RunConfig:
    """A run of rows of 256 tokens, one per micro-batch."""
    parallel = ParallelConfig(
        pipeline_model_parallel_size=options.pp,
        vision_placement=placement,
        device="cpu",
        layer_backend="torch",
    )
    train = TrainConfig(micro_batch_size=1, global_batch_size=options.micro_batches)
    data, precision = DataConfig(seq_length=256), PrecisionConfig(params="fp32")
    return RunConfig(model=MODEL, parallel=parallel, train=train, data=data, precision=precision)


def image_tokens() -> int:
    """Visual tokens of an image."""
    return sum((MODEL.vision.crop_tokens, MODEL.vision.global_tokens)[kind] for kind in IMAGE)


def visual_images(share: float) -> int:
    """Images of a row. Raises ConfigError for a share that gives none, or leaves no text."""
    images = round(share * 256 / image_tokens())
    if not 0 < images * image_tokens() < 256:
        raise ConfigError(
            f"--visual-share {share}: an image has {image_tokens()} of a row's 256 tokens; use 0.25"
        )
    return images


def micro_batches(config: RunConfig, images: int, layout: Layout, rank: int) -> list[MicroBatch]:
    """One step's rows of random words and pixels, with this rank's share of the pixels."""
    random, model = np.random.default_rng(1), config.model
    words = np.setdiff1d(np.arange(model.text.vocab_size), [model.tokens.im_patch])
    made = []
    for number in range(config.train.global_batch_size):
        ids = random.choice(words, 256).astype(np.int64)
        ids[: images * image_tokens()] = model.tokens.im_patch
        labels = np.where(ids == model.tokens.im_patch, -100, ids)
        row = Row(f"row{number}", ids, labels, IMAGE * images)
        made.append(collate([row], 256, 0, model.vision.image_size, model.vision.crop_size))
    shares = views_of_rank(model, layout, layout.coords(rank), [batch.view_kinds for batch in made])
    return [with_pixels(batch, mine, number) for number, (batch, mine) in enumerate(zip(made, shares))]


def with_pixels(batch: MicroBatch, mine: Sequence[int], number: int) -> MicroBatch:
    """mine: the views of this rank."""
    pixels: dict[int, list[torch.Tensor]] = {CROP: [], GLOBAL: []}
    for view in mine:
        kind = batch.view_kinds[view]
        side = (batch.crop_pixels, batch.global_pixels)[kind].shape[-1]
        generator = torch.Generator().manual_seed(1000 * number + view)
        pixels[kind].append(torch.randn(3, side, side, generator=generator))
    return replace(
        batch,
        crop_pixels=torch.stack(pixels[CROP]) if pixels[CROP] else batch.crop_pixels,
        global_pixels=torch.stack(pixels[GLOBAL]) if pixels[GLOBAL] else batch.global_pixels,
    )


def steps_on_rank(config: RunConfig, images: int, steps: int) -> Taken:
    """Steps of one rank behind one that warms up."""
    torch.set_num_threads(1)
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    parts = build(config, runtime, FreshWeights(config.model, config.train.seed))
    feed = micro_batches(config, images, runtime.layout, runtime.rank)
    taken = Taken([], [], [])
    for number in range(steps + 1):
        runtime.groups.replica.barrier().wait()
        wall, own = time.perf_counter(), time.process_time()
        loss = train_step(parts, feed, 1e-4).loss
        runtime.groups.replica.barrier().wait()
        if number:
            taken.wall.append(time.perf_counter() - wall)
            taken.own.append(time.process_time() - own)
            taken.losses.append(loss)
    return taken


def summary(of_ranks: Sequence[Taken]) -> dict[str, Any]:
    """Medians over the steps: wall seconds, and processor seconds by rank."""
    own = [statistics.median(taken.own) for taken in of_ranks]
    wall = of_ranks[0].wall
    return {
        "step_seconds": statistics.median(wall), "least": min(wall), "most": max(wall), "processor_seconds": own,
        "busiest": max(own), "balance": max(own) / statistics.mean(own), "losses": of_ranks[0].losses,
    }  # fmt: skip


def tower_share(config: RunConfig, images: int) -> float:
    """Of the FLOPs of a step."""
    tower, decoder = tower_and_decoder(
        train_flops(config.model, sample_flops(config.model, IMAGE * images, [256]))
    )
    return tower / (tower + decoder)


def work_alone(config: RunConfig, images: int, pp: int) -> float:
    """What a step would take with a core for each rank if nothing but FLOPs cost time, filling included; a step of
    which all ranks do equal parts without waiting is 1."""
    forward = sample_flops(config.model, IMAGE * images, [256])
    flops, count = train_flops(config.model, forward), config.train.global_batch_size
    tower, decoder = tower_and_decoder(flops)
    layers = balanced_layers(config.model.text.num_layers, pp)
    chunks = [(decoder - flops["lm_head"]) * n / sum(layers) for n in layers]
    chunks[-1] += flops["lm_head"]
    ahead = config.parallel.vision_placement == "all"
    if not ahead:
        chunks[0] += tower
    seconds, _ = pipeline_seconds(chunks, pp, count, 0.0)
    mean = count * (tower + decoder) / pp
    return (seconds + (count * tower / pp if ahead else 0.0)) / mean


def report(record: dict[str, dict[str, Any]], whole: dict[str, Any], good: bool) -> str:
    """A table and what it says."""
    lines = [
        f"PP{whole['pp']} on {whole['cores']} cores, {whole['micro_batches']} micro-batches of 256 tokens, "
        f"{whole['visual_tokens']} of them visual; the tower has {whole['tower_share']:.0%} of the FLOPs",
        "",
        f"{'placement':<10} {'step s':>8} {'least':>8} {'most':>8} {'busiest s':>10} {'balance':>8} {'work alone':>11}",
    ]
    for name, one in record.items():
        lines.append(
            f"{name:<10} {one['step_seconds']:>8.3f} {one['least']:>8.3f} {one['most']:>8.3f} {one['busiest']:>10.3f} "
            f"{one['balance']:>8.2f} {one['work_alone']:>11.2f}"
        )
    first, *others = record
    for name in others:
        step, busiest, alone = (
            record[first][key] / record[name][key] for key in ("step_seconds", "busiest", "work_alone")
        )
        lines.append(
            f"{first} over {name}: step {step:.2f}, busiest rank {busiest:.2f}, work alone {alone:.2f}"
        )
    lines += [
        "",
        "busiest: processor seconds of the rank that has most, the least that a step can take; balance: over the mean;",
        "work alone: a step with a core per rank by FLOPs, the pipeline's filling included, over equal parts of them.",
    ]
    return "\n".join([*lines, "losses equal" if good else "LOSSES DIFFER"])
