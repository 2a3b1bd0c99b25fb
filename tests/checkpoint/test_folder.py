"""The folder of a run's checkpoints, without ranks."""

import os

import pytest

from megatron_vl.checkpoint.folder import (
    checkpoints,
    find,
    half_written,
    leftovers,
    missing_latest,
    name_of,
    point_latest,
    set_aside,
    step_of,
    to_remove,
)
from megatron_vl.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    for name in (
        "step_00000003",
        "step_00000012",
        "step_123456789",
        "step_00000015.tmp",
        "step_00000003.old",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_00000099").write_text("a file")
    return tmp_path


def test_names():
    assert name_of(100) == "step_00000100" and name_of(123456789) == "step_123456789"


def test_newest_comes_first_and_others_are_no_checkpoints(folder):
    assert [step_of(p) for p in checkpoints(folder)] == [123456789, 12, 3]
    assert [p.name for p in half_written(folder)] == ["step_00000015.tmp"]
    assert {p.name for p in leftovers(folder)} == {"step_00000015.tmp", "step_00000003.old"}
    assert checkpoints(folder / "nowhere") == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "removed"),
    [(None, 0, []), (2, 0, [1, 2, 3, 4]), (1, 2, [1, 3, 5]), (3, 3, [1, 2]), (9, 0, [])],
)
def test_retention(keep_last, keep_every, removed):
    assert to_remove([1, 2, 3, 4, 5, 6], keep_last, keep_every) == removed


def test_what_retention_gives_up_is_renamed_or_reported(folder, monkeypatch):
    going, problems = set_aside(folder, 123456789, 2, 0)
    assert sorted({p.name for p in going}) == ["step_00000003.old", "step_00000015.old"] and problems == []
    assert [step_of(p) for p in checkpoints(folder)] == [123456789, 12]

    def busy(*args):
        raise OSError(16, "busy")

    monkeypatch.setattr(os, "rename", busy)
    _, (problem,) = set_aside(folder, 123456789, 1, 0)
    assert "step_00000012 could not be removed" in problem and "busy" in problem
    assert (folder / "step_00000012").is_dir()


@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_newer_checkpoints_cost_no_good_one(tmp_path, keep_last):
    """After a fall-back from 15 and 20 to 10 the next save is 11: neither it nor 10 may go for theirs."""
    for step in (9, 10, 11, 15, 20):
        (tmp_path / name_of(step)).mkdir()
    set_aside(tmp_path, 11, keep_last, 0)
    assert [step_of(p) for p in checkpoints(tmp_path)] == [20, 15, 11, 10][: 2 + keep_last]


def test_latest(folder):
    assert missing_latest(folder) == ""
    point_latest(folder / "step_00000012")
    assert (folder / "latest").read_text() == "step_00000012\n" and missing_latest(folder) == ""
    for wrong in ("step_00000044", "../elsewhere", "", "x" * 5000, "step_00000015.tmp"):
        (folder / "latest").write_text(wrong)
        assert "which is not there" in missing_latest(folder)
    assert not (folder / "latest.tmp").exists()


def test_find_what_a_user_means(folder, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run / "checkpoints" / "step_00000004").mkdir()
    assert find(run).name == find(run / "checkpoints").name == "step_00000004"
    point_latest(run / "checkpoints" / "step_00000002")
    assert find(run).name == "step_00000002"
    (folder / "step_00000003" / "manifest.json").write_text("{}")
    assert find(folder / "step_00000003") == folder / "step_00000003"
    with pytest.raises(CheckpointError, match="no checkpoint is there; name a step_"):
        find(folder / "notes")
