"""Frequencies of the decoder's rotary embedding, and what goes with them, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

from megatron_vl.config.rope import RopeScaling, yarn_attention_factor
from megatron_vl.errors import Problem

PATH = "model.text.rope_scaling"
READ_BY = {"none": (), "theta": ("theta",)}  # yarn reads all but theta


def rope_frequencies(channels: int, rotary_base: float, scaling: RopeScaling) -> list[float]:
    """Angle per position of each pair of channels, ``channels / 2`` numbers, the fastest first.

    YaRN as transformers and vLLM have it: a pair of channels is kept when it turns at least ``beta_fast`` times over
    the original length, divided by ``factor`` when at most ``beta_slow`` times, and mixed in between by its index; both
    ends are widened to whole indices.
    """
    base = scaling.theta if scaling.kind == "theta" else rotary_base
    plain = [base ** (-2 * i / channels) for i in range(channels // 2)]
    if scaling.kind != "yarn":
        return plain
    kept_to, stretched_from = _ramp(channels, base, scaling)
    width = max(stretched_from - kept_to, 0.001)
    mixed = []
    for i, frequency in enumerate(plain):
        stretched = min(max((i - kept_to) / width, 0.0), 1.0)
        mixed.append(frequency * (1 - stretched + stretched / scaling.factor))
    return mixed


def _ramp(channels: int, base: float, scaling: RopeScaling) -> tuple[int, int]:
    """(last index that is kept, first that is divided), within the head."""

    def index_of(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return channels * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    return max(math.floor(index_of(scaling.beta_fast)), 0), min(
        math.ceil(index_of(scaling.beta_slow)), channels - 1
    )


def attention_scale(channels: int, scaling: RopeScaling) -> float:
    """Factor of the scores before the softmax: ``m^2 / sqrt(channels)``.

    YaRN multiplies rotated queries and keys by ``m``. All channels of a head are rotated, so that the scores are
    multiplied by ``m^2``; this way fused rotary kernels, which know no ``m``, stay usable.
    """
    factor = 1.0
    if scaling.kind == "yarn":
        factor = scaling.attention_factor or yarn_attention_factor(scaling.factor)
    return factor**2 / math.sqrt(channels)


def check_rope_scaling(scaling: RopeScaling) -> Iterator[Problem]:
    """Keys that are missing, that contradict each other, or that the kind does not read."""
    names = [field.name for field in fields(scaling) if field.name != "kind"]
    read = READ_BY.get(scaling.kind, tuple(name for name in names if name != "theta"))
    untouched = RopeScaling()
    for name in names:
        value = getattr(scaling, name)
        if name not in read and value != getattr(untouched, name):
            rule = f"is not read with {PATH}.kind = {scaling.kind}"
            yield Problem(f"{PATH}.{name}", value, rule, "remove it or change the kind")
    if scaling.kind == "theta" and scaling.theta is None:
        yield Problem(f"{PATH}.theta", None, "is needed with kind = theta", "give the new base")
    if scaling.kind != "yarn":
        return
    if scaling.original_max_position_embeddings is None:
        yield Problem(
            f"{PATH}.original_max_position_embeddings",
            None,
            "is needed with kind = yarn",
            "give the length that the weights were trained for, 65536 for the release",
        )
    if scaling.factor == 1:
        yield Problem(
            f"{PATH}.factor", scaling.factor, "must be greater than 1 with kind = yarn", "e.g. 2 for 131072"
        )
    if scaling.beta_fast <= scaling.beta_slow:
        yield Problem(
            f"{PATH}.beta_fast",
            scaling.beta_fast,
            f"must be greater than beta_slow = {scaling.beta_slow}",
            "the paper has 32 and 1",
        )
