"""One builder at a time: waiting, taking over from a dead one, and giving up when taken over."""

import os
import threading
import time

import pytest

from megatron_vl.data.build_lock import BuildLock
from megatron_vl.errors import DataError


def quiet(line: str) -> None:
    """Says nothing."""


def lock(path, say=quiet, silent_seconds=5.0) -> BuildLock:
    return BuildLock(path, say, silent_seconds, beat_seconds=0.05)


def test_the_second_waits_for_the_first(tmp_path):
    path, order, said = tmp_path / "a" / "web.lengths", [], []

    def second():
        with lock(path, said.append):
            order.append("second")

    with lock(path) as first:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.4)
        first.check()
        order.append("first")
        assert sorted(os.listdir(path.parent)) == ["web.lengths.lock-1"]
    thread.join()
    assert order == ["first", "second"] and os.listdir(path.parent) == []
    assert len(said) == 1 and "is being built by" in said[0] and f"process {os.getpid()}" in said[0]


def test_other_names_are_other_locks(tmp_path):
    (tmp_path / "a.lengths.lock-").touch()
    with lock(tmp_path / "a.lengths"), lock(tmp_path / "a"), lock(tmp_path / "b.lengths"):
        assert len(os.listdir(tmp_path)) == 4


def test_a_dead_holder_is_succeeded_by_one_only(tmp_path):
    """Its file stays as it was, while several wait: they go in one after the other."""
    path, inside, most = tmp_path / "web.lengths", [], []
    (tmp_path / "web.lengths.lock-1").write_text("elsewhere process 1 abc\n7\n")

    def one():
        with lock(path, silent_seconds=0.3):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.5)  # longer than the time of silence: the beats are what keeps it
            inside.pop()

    threads = [threading.Thread(target=one) for _ in range(3)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1] and time.monotonic() - begin > 0.3 + 3 * 0.5
    assert os.listdir(tmp_path) == []


def test_a_holder_that_slept_gives_up(tmp_path):
    path = tmp_path / "web.lengths"
    with lock(path) as sleeper:
        sleeper.check()
        (tmp_path / "web.lengths.lock-2").write_text("node7 process 8 def\n0\n")
        with pytest.raises(
            DataError, match="node7 process 8 def took over building it, since this process was"
        ):
            sleeper.check()
    assert os.listdir(tmp_path) == ["web.lengths.lock-2"], "the other's lock stays"


def test_a_holder_that_slept_longer_does_not_take_the_lock_of_a_third(tmp_path):
    path = tmp_path / "web.lengths"
    with lock(path) as sleeper:
        (tmp_path / "web.lengths.lock-1").write_text("node9 process 3 xyz\n0\n")
        time.sleep(0.2)
        assert (tmp_path / "web.lengths.lock-1").read_text().startswith("node9")
        with pytest.raises(DataError, match="node9 process 3 xyz took over"):
            sleeper.check()
    assert os.listdir(tmp_path) == ["web.lengths.lock-1"], "and does not remove it either"
