"""The learning rate as a function of tokens."""

from __future__ import annotations

import pytest

from megatron_vl.config.schema import LrPhase, ScheduleConfig
from megatron_vl.optim.schedule import learning_rate
from megatron_vl.plan.checks import load_checked_run

BILLION = 10**9


@pytest.fixture(scope="module")
def published() -> ScheduleConfig:
    return load_checked_run("examples/pretrain/step3_vl_10b.yaml", [], None, None).config.schedule


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (2 * BILLION, 5e-5),
        (450 * BILLION, 3e-5),
        (900 * BILLION, 1e-5),
        (1050 * BILLION, 8e-6),
        (1200 * BILLION, 6e-6),
        (1500 * BILLION, 6e-6),
    ],
)
def test_the_published_two_phases(published: ScheduleConfig, tokens: int, expected: float):
    """900B from 5e-5 to 1e-5, then 300B to 6e-6 (spec/recipe.md 1); the end value holds."""
    assert learning_rate(published, tokens) == pytest.approx(expected, rel=1e-3)


def test_phases_join_without_a_jump(published: ScheduleConfig):
    before, after = (learning_rate(published, 900 * BILLION + d) for d in (-1, 0))
    assert before == pytest.approx(after, rel=1e-6)


def test_warm_up_is_linear_from_zero():
    schedule = ScheduleConfig(warmup_tokens=1000, phases=[LrPhase(10_000, 1.0, 1.0, "constant")])
    assert [learning_rate(schedule, t) for t in (0, 500)] == [0.0, 0.5]
    assert [learning_rate(schedule, t) for t in (1000, 20_000)] == [1.0, 1.0]


@pytest.mark.parametrize(("style", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_shapes(style: str, middle: float):
    end = 1.0 if style == "constant" else 0.1
    schedule = ScheduleConfig(phases=[LrPhase(1000, 1.0, end, style)])
    assert learning_rate(schedule, 0) == 1.0
    assert learning_rate(schedule, 500) == pytest.approx(middle)
    assert learning_rate(schedule, 1000) == pytest.approx(end)


def test_cosine_is_no_line():
    schedule = ScheduleConfig(phases=[LrPhase(1000, 1.0, 0.0, "cosine")])
    assert learning_rate(schedule, 250) == pytest.approx(0.8536, abs=1e-4)
