"""Learning rate as a pure function of the tokens consumed."""

from __future__ import annotations

import math

from megatron_vl.config.schema import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, tokens: int) -> float:
    """Learning rate after ``tokens`` consumed tokens.

    Phases follow one another; behind the last one its end value holds. The linear warm-up from 0 multiplies it, so
    the very first step only fills the optimizer's averages. Tokens, not iterations, are the knob, because
    the published iteration count does not agree with the token count (spec/recipe.md 1).
    """
    warm = min(1.0, tokens / schedule.warmup_tokens) if schedule.warmup_tokens else 1.0
    start = 0
    for phase in schedule.phases:
        if tokens < start + phase.tokens:
            done = (tokens - start) / phase.tokens
            return warm * (phase.lr_end + (phase.lr_start - phase.lr_end) * _remaining(phase.style, done))
        start += phase.tokens
    return warm * schedule.phases[-1].lr_end


def warmed_up(rate: float, warmup_steps: int, step: int) -> float:
    """The learning rate of optimizer step ``step`` (the first is 0): linear up to ``rate``, then constant."""
    return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else rate


def _remaining(style: str, done: float) -> float:
    """Share of the way from ``lr_end`` back to ``lr_start`` that is left; done in [0, 1]."""
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - done if style == "linear" else 1.0
