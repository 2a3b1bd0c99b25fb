"""A world of local ranks names the one that failed, and ends in time."""

import time

import pytest

from megatron_vl.parallel.world import LocalWorld, RankFailed
from tests.parallel.on_ranks import die_on_one, fail_on_one, hang_on_one, say


def test_jobs_one_after_the_other(world):
    assert world.run(2, say, "rank") == ["rank 0 of 2", "rank 1 of 2"]
    assert world.run(4, say, "rank")[3] == "rank 3 of 4"
    assert world.run(1, say, "rank") == ["rank 0 of 1"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_on_one, "rank 1 failed: ValueError: this one does not like its input"),
        (die_on_one, "rank 1 died with exit code -9"),
        (hang_on_one, r"rank\(s\) \[1\] did not answer in time"),
    ],
)
def test_the_failing_rank_is_named_and_nothing_is_left(function, message):
    with LocalWorld(2) as world:
        processes = list(world._processes)
        begin = time.monotonic()
        with pytest.raises(RankFailed, match=message):
            world.run(2, function, 1, limit=8.0)
        assert time.monotonic() - begin < 60
        assert not world.alive and not any(process.is_alive() for process in processes)
