"""What several tests of rewards share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_vl.rl.rewards.math_pool import MathPool, MathSettings


@pytest.fixture(scope="session")
def math_pool() -> Iterator[MathPool]:
    """Two processes with a time-out that a busy machine keeps, too."""
    with MathPool(MathSettings(processes=2, timeout_seconds=60.0)) as pool:
        yield pool
