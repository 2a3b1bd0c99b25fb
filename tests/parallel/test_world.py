"""A world of local ranks names the one that failed, and ends in time."""

import signal
import time
from unittest.mock import Mock, patch

import pytest

from megatron_vl.parallel.world import LocalWorld, RankFailed
from tests.fixtures.world import KeptWorld
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
        with pytest.raises(RankFailed, match=message) as failed:
            world.run(2, function, 1, limit=8.0)
        assert failed.value.signal == (signal.SIGKILL if function is die_on_one else None)
        assert time.monotonic() - begin < 60
        assert not world.alive and not any(process.is_alive() for process in processes)


DAMAGED = RankFailed("rank 1 died with exit code -6", signal.SIGABRT)


@pytest.mark.parametrize(
    ("answers", "crashes", "started"),
    [
        ([DAMAGED, "done"], 1, 2),
        ([DAMAGED, DAMAGED], 1, 2),
        ([RankFailed("rank 1 died with exit code -9", signal.SIGKILL)], 0, 1),
        ([RankFailed("rank 1 failed: ValueError")], 0, 1),
    ],
)
def test_only_what_native_code_has_ended_is_done_again_and_told(answers, crashes, started):
    world, kept = Mock(alive=False, _processes=[]), KeptWorld()
    world.run.side_effect = answers
    with patch("megatron_vl.parallel.world.LocalWorld", return_value=world):
        if answers[-1] == "done":
            assert kept.run(2, say) == "done"
        else:
            with pytest.raises(RankFailed):
                kept.run(2, say)
    assert len(kept.crashes) == crashes and kept.started == started
    assert all("test_only_what_native" in line and "code -6" in line for line in kept.crashes)
