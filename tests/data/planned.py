"""Length indices and plans without files, for the tests of mixture and packing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_vl.config.mixture import DomainConfig, MixturePhase
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.data.lengths import LengthIndex
from megatron_vl.data.make_plan import make_plan
from megatron_vl.data.plan_settings import PlanSettings
from megatron_vl.data.row_plan import PlannedRow, RowPlan
from megatron_vl.plan.row_work import WorkRates

LENGTH = 4096


def index_of(name: str, tokens, globals_=None, crops=None, refused=()) -> LengthIndex:
    """An index of the given lengths; the samples in `refused` are missing."""
    tokens = np.array(tokens, dtype=np.int32)
    views = [
        np.zeros(len(tokens), np.int32) if v is None else np.array(v, np.int32) for v in (globals_, crops)
    ]
    reasons = np.zeros(len(tokens), dtype=np.uint8)
    reasons[list(refused)] = 1
    for values in (tokens, *views):
        values[list(refused)] = 0
    digest = f"{name} {tokens.tobytes().hex()[:64]} {len(tokens)}"
    return LengthIndex(name, tokens, *views, reasons, ("", "missing"), digest)


def text_index(name: str, samples: int, seed: int, refused_share: float = 0.0) -> LengthIndex:
    """Documents of 20 to 4096 tokens, log-normal, median 300."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(np.exp(rng.normal(5.7, 1.0, samples)).astype(int) + 20, LENGTH)
    return index_of(name, tokens, refused=np.flatnonzero(rng.random(samples) < refused_share))


def image_index(name: str, samples: int, seed: int, refused_share: float = 0.0) -> LengthIndex:
    """Documents of one or two images with 0 to 6 crops each and some text."""
    rng = np.random.default_rng(seed)
    globals_ = rng.integers(1, 3, samples)
    crops = globals_ * rng.integers(0, 7, samples)
    tokens = np.exp(rng.normal(4.5, 0.8, samples)).astype(int) + 20 + 171 * globals_ + 83 * crops
    chosen = np.flatnonzero(rng.random(samples) < refused_share)
    return index_of(name, np.minimum(tokens, LENGTH), globals_, crops, chosen)


def settings_of(domains=None, phases=None, **changes) -> PlanSettings:
    domains = domains or (domain("text", weight=1.0, modality="text"), domain("vqa", weight=1.0))
    settings = PlanSettings(
        seq_length=LENGTH,
        global_batch_size=8,
        seed=7,
        rates=WorkRates.of(STEP3_VL_TINY),
        domains=tuple(domains),
        phases=tuple(phases or [MixturePhase()]),
        pad_multiple=16,
        look_ahead_rows=32,
    )
    return replace(settings, **changes)


def domain(name: str, **changes) -> DomainConfig:
    return DomainConfig(**{"name": name, "paths": ["a.jsonl"], **changes})


def plan_of(indices, num_steps=None, **changes) -> RowPlan:
    return make_plan(settings_of(**changes), indices, num_steps)


def documents_in(rows: list[PlannedRow], domain: int | None = None) -> list[tuple[int, int]]:
    """(domain, sample) of all documents of some rows, refused ones too."""
    found = [(d.domain, d.index) for row in rows for d in row.documents]
    return [pair for pair in found if domain is None or pair[0] == domain]
