"""Trajectories with text and images for the small model, and runs that train on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_vl.config.mixture import PackingConfig
from megatron_vl.config.rl import PpoConfig, RlConfig
from megatron_vl.config.schema import DataConfig, RunConfig, TrainConfig
from megatron_vl.generate.request import LENGTH, STOP, Prompt, Response
from megatron_vl.parity.layouts import parse_layout
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.vision_share import CROP
from megatron_vl.rl.trajectory import Trajectory
from tests.fixtures.small import SMALL, make_documents

FROZEN = replace(SMALL, freeze_vision=True, freeze_projector=True)
VERSION = "weights-1"
# (images as grids of crops, tokens behind the last one, of which are response)
SPECS = (
    ([(1, 2)], 11, 7), ([], 17, 12), ([(0, 0)], 6, 1), ([], 9, 8), ([(0, 0), (1, 1)], 5, 4), ([], 21, 3),
    ([], 4, 2), ([(2, 1)], 8, 5), ([], 13, 12), ([], 6, 4),
)  # fmt: skip


def make_trajectories(specs: Sequence[tuple] = SPECS, seed: int = 8) -> list[Trajectory]:
    """The last tokens of each document are its response; the third is cut at its limit."""
    documents = make_documents(SMALL, [(grids, text) for grids, text, _ in specs], seed)
    made = []
    for number, (document, (_, _, length)) in enumerate(zip(documents, specs)):
        generator = torch.Generator().manual_seed(100 * seed + number)
        ids = document.ids.tolist()
        prompt = Prompt(f"p{number}", tuple(ids[:-length]), tuple(document.kinds))
        logprobs = tuple((-6 + torch.randn(length, generator=generator)).clamp(max=-0.1).tolist())
        reason = LENGTH if number == 2 else STOP
        response = Response(f"p{number}", 0, number, VERSION, tuple(ids[-length:]), logprobs, reason)
        made.append(Trajectory(prompt, response, reward=float(torch.rand((), generator=generator))))
    return made


def features_of(prompt: Prompt) -> torch.Tensor:
    """Features that are a function of the prompt, ``[rows, h]``."""
    vision = SMALL.vision
    rows = sum(vision.crop_tokens if kind == CROP else vision.global_tokens for kind in prompt.view_kinds)
    seed = int.from_bytes(hashlib.sha256(prompt.prompt_id.encode()).digest()[:4], "little")
    return torch.randn((rows, SMALL.text.hidden_size), generator=torch.Generator().manual_seed(seed))


def run_of(
    layout: str, packed: bool = True, ppo: PpoConfig | None = None, rows: int = 1, **rl: Any
) -> tuple[RunConfig, Layout]:
    """Description and layout of a run, ``pp2/all`` with another placement than ``data``. rows: of a dense micro-batch.
    rl: further sections of `RlConfig`."""
    name, _, placement = layout.partition("/")
    named = parse_layout(name, placement or "data", "cpu")
    packing = PackingConfig(enabled=packed, pad_multiple=8)
    config = RunConfig(
        model=FROZEN,
        parallel=named.parallel,
        data=DataConfig(seq_length=96 if packed else 64, packing=packing),
        train=TrainConfig(micro_batch_size=rows),
        rl=RlConfig(ppo=ppo or PpoConfig(), **rl),
    )
    return config, Layout.from_config(named.parallel, named.world_size)
