"""One long packed row, trained for one step in several layouts: equal losses, and what each rank's activations take.

The geometry is that of the release (728 and 504 pixels, 169 and 81 tokens), the widths are tiny, so a row of 131,072
tokens fits a laptop. Every layout gets fresh processes: the peak of one is not that of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.config.model import ModelConfig, TextConfig, VisionConfig
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import (
    DataConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)
from megatron_vl.data.batch import MicroBatch, Row, pack
from megatron_vl.data.crops import CropPlan, image_token_ids, plan_crops
from megatron_vl.data.template import NOT_SCORED
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parity.layouts import NamedLayout
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.shares import views_of_rank
from megatron_vl.plan.vision_share import CROP
from megatron_vl.train.build import build
from megatron_vl.train.step import train_step

PAD_MULTIPLE = 64  # whatever the layout, so that every layout has the same row; enough for CP8 x TP4
SIZES = ((640, 480), (1024, 768), (1280, 720), (720, 1280), (1600, 1200), (1920, 1080), (500, 500))

# The released geometry with widths of a toy; 8 query groups allow TP8.
LONG_MODEL = ModelConfig(
    vision=VisionConfig(hidden_size=32, num_layers=2, num_attention_heads=2, ffn_hidden_size=64),
    text=TextConfig(
        hidden_size=64, num_layers=2, num_attention_heads=8, num_query_groups=8, kv_channels=8,
        ffn_hidden_size=128, vocab_size=512,
    ),
    tokens=STEP3_VL_TINY.tokens,
)  # fmt: skip


@dataclass(frozen=True)
class LongRow:
    """What the row holds."""

    seq_length: int = 131_072
    documents: int = 60
    images: int = 110
    seed: int = 17


def make_row(spec: LongRow, model: ModelConfig) -> list[Row]:
    """Documents that fill the row up to padding: images dealt at random, the rest random text, half of it scored.

    Raises:
        ConfigError: the images alone do not fit.
    """
    rng = np.random.default_rng(spec.seed)
    plans: list[list[CropPlan]] = [[] for _ in range(spec.documents)]
    for _ in range(spec.images):
        plans[rng.integers(spec.documents)].append(plan_crops(*SIZES[rng.integers(len(SIZES))]))
    vision = model.vision
    streams = [
        [image_token_ids(plan, model.tokens, vision.global_tokens, vision.crop_tokens) for plan in of_one]
        for of_one in plans
    ]
    taken = [sum(map(len, of_one)) for of_one in streams]
    room = spec.seq_length - sum(taken) - spec.documents * PAD_MULTIPLE
    if room < 2 * spec.documents:
        raise ConfigError(
            f"--images {spec.images}: their {sum(taken)} tokens leave no room for text in --seq-length "
            f"{spec.seq_length}; ask for fewer images"
        )
    texts = np.maximum(2, (rng.dirichlet(np.full(spec.documents, 4.0)) * room).astype(int) - 1)
    smallest_special = min(v for v in vars(model.tokens).values())
    rows = []
    for number, (of_one, length) in enumerate(zip(streams, texts.tolist())):
        words = rng.integers(1, smallest_special, length)
        images = np.array([i for image in of_one for i in image], dtype=np.int64)
        ids = np.concatenate([words[: length // 2], images, words[length // 2 :]]).astype(np.int64)
        labels = np.full(len(ids), NOT_SCORED, dtype=np.int64)
        answer = length - length // 2
        labels[len(ids) - answer :] = ids[len(ids) - answer :]
        kinds = tuple(kind for plan in plans[number] for kind in plan.view_kinds)
        rows.append(Row(f"document{number}", ids, labels, kinds))
    return rows


def micro_batch(spec: LongRow, model: ModelConfig, layout: Layout, rank: int) -> MicroBatch:
    """The row as ``rank`` is fed with it: pixels of its own share, noise that depends on the view's number only."""
    vision = model.vision
    batch = pack(
        make_row(spec, model),
        spec.seq_length,
        PAD_MULTIPLE,
        model.tokens.endoftext,
        vision.image_size,
        vision.crop_size,
    )
    (mine,) = views_of_rank(model, layout, layout.coords(rank), [batch.view_kinds])
    crops = [v for v in mine if batch.view_kinds[v] == CROP]
    whole = [v for v in mine if batch.view_kinds[v] != CROP]
    return replace(
        batch,
        crop_pixels=_noise(crops, vision.crop_size, spec.seed),
        global_pixels=_noise(whole, vision.image_size, spec.seed),
    )


def _noise(views: Sequence[int], side: int, seed: int) -> torch.Tensor:
    """``[n, 3, side, side]``; a coarse pattern per view, so that views differ in more than noise."""
    pixels = torch.empty(len(views), 3, side, side)
    for place, view in enumerate(views):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + view)
        coarse = torch.randn(1, 3, 9, 9, generator=generator)
        pixels[place] = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")[0]
    return pixels


@dataclass(frozen=True)
class Measured:
    """One rank's step. bytes: resident set after build, its peak during the step, and of the pixels in it."""

    loss: float
    tokens: int
    grad_norm: float
    built_bytes: int
    peak_bytes: int
    pixel_bytes: int

    @property
    def activation_bytes(self) -> int:
        """Peak minus what was there after the build."""
        return self.peak_bytes - self.built_bytes


@dataclass(frozen=True)
class LongJob:
    """One layout's run."""

    config: RunConfig
    spec: LongRow


def job_of(named: NamedLayout, spec: LongRow, model: ModelConfig, recompute: RecomputeConfig) -> LongJob:
    """The run of one layout: fp32 on the torch layers, one row per step."""
    config = RunConfig(
        model=model,
        parallel=replace(named.parallel, layer_backend="torch", timeout_seconds=3600),
        precision=PrecisionConfig(params="fp32"),
        recompute=recompute,
        data=DataConfig(seq_length=spec.seq_length),
        train=TrainConfig(micro_batch_size=1, global_batch_size=1),
    )
    return LongJob(config, spec)


def run_long(job: LongJob) -> Measured:
    """What ``LocalWorld.run`` calls on every rank: build, one optimizer step."""
    config = job.config
    runtime = start(config.parallel, config.train.seed, choose_device(config.parallel.device))
    parts = build(config, runtime, FreshWeights(config.model, config.train.seed))
    built = resident_bytes("VmRSS")
    reset_peak()
    batch = micro_batch(job.spec, config.model, runtime.layout, runtime.rank)
    pixels = batch.crop_pixels.nbytes + batch.global_pixels.nbytes
    result = train_step(parts, [batch], lr=1e-3)
    return Measured(result.loss, result.tokens, result.grad_norm, built, resident_bytes("VmHWM"), pixels)


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Let ``VmHWM`` begin anew (Linux, man 5 proc: clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
