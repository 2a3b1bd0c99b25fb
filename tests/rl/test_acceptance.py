"""Acceptance classes and the difficulty filter."""

import pytest

from megatron_vl.rl.acceptance import (
    ALL,
    NONE,
    SOME,
    SOME_REJECTED,
    UNKNOWN,
    Acceptance,
    by_prompt,
    class_counts,
    keeps,
)


@pytest.mark.parametrize(
    "rewards, kind",
    [
        ((1.0, 1.0), ALL),
        ((1.0, 0.0), SOME),
        ((1.0, 0.0, 0.9), SOME_REJECTED),
        ((0.0, 0.99), NONE),
        ((), UNKNOWN),
    ],
)
def test_classes(rewards, kind):
    assert Acceptance(rewards, 0).kind == kind


def test_masked_responses_do_not_count():
    table = by_prompt(
        [("a", 1.0, False), ("a", 0.0, True), ("b", 0.0, True), ("c", 0.0, False), ("c", 1.0, False)]
    )
    assert table["a"].kind == ALL and table["a"].masked == 1
    assert table["b"].kind == UNKNOWN and not keeps(table["b"])
    assert keeps(table["c"]) and table["c"].rate == 0.5
    assert class_counts(table) == {ALL: 1, SOME: 1, SOME_REJECTED: 0, NONE: 0, UNKNOWN: 1}


def test_bounds():
    half = Acceptance((1.0, 0.0), 0)
    assert not keeps(half, 0.5, 1.0) and keeps(half, 0.5, 1.0, strict=False)
    assert not keeps(Acceptance((1.0,), 0)) and not keeps(Acceptance((0.0,), 0))
    assert keeps(Acceptance((1.0,) * 8 + (0.0,) * 16, 0), 0.0, 9 / 24)
    assert not keeps(Acceptance((1.0,) * 9 + (0.0,) * 15, 0), 0.0, 9 / 24)
