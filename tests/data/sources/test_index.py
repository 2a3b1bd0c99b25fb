"""Stored indexes: made once, in parallel and resumable, and never believed when they are stale or damaged."""

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.sources import index_build, index_file
from megatron_vl.data.sources.index_build import index_files, index_path
from megatron_vl.data.sources.index_file import FileIndex, Scan, load, store
from megatron_vl.data.sources.lines import LINES_KIND, scan_lines
from megatron_vl.data.sources.open import open_source
from megatron_vl.errors import ConfigError, DataError
from tests.data.sources.making import jsonl, quiet, tar


@pytest.fixture
def files(tmp_path) -> list[str]:
    return [
        jsonl(tmp_path / f"{n}.jsonl", [{"id": f"{n}.{k}", "text": "x"} for k in range(n + 1)])
        for n in range(4)
    ]


@pytest.fixture
def scanned(monkeypatch) -> list[str]:
    """Files that were scanned in this process."""
    done: list[str] = []

    def scan(path: str) -> Scan:
        done.append(os.path.basename(path))
        return scan_lines(path)

    monkeypatch.setattr("megatron_vl.data.sources.open.scan_lines", scan)
    return done


def ids(source) -> list[str]:
    return [source[n].parse().id for n in range(len(source))]


ALL = [f"{n}.{k}" for n in range(4) for k in range(n + 1)]


def test_built_once(files, tmp_path, scanned):
    for _ in range(3):
        assert ids(open_source(files, cache_dir=str(tmp_path / "cache"), say=quiet)) == ALL
    assert scanned == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"]
    assert len(os.listdir(tmp_path / "cache")) == 4
    open_source(files[:1], say=quiet)  # without a cache folder: in memory, at every start
    assert scanned[4:] == ["0.jsonl"] and sorted(os.listdir(tmp_path)) == [
        *(f"{n}.jsonl" for n in range(4)),
        "cache",
    ]


def test_resumed_where_it_was_interrupted(files, tmp_path, scanned, monkeypatch):
    cache = str(tmp_path / "cache")
    os.rename(files[2], files[2] + ".away")
    with pytest.raises(DataError, match="2.jsonl: cannot be read"):
        index_files(files, scan_lines, LINES_KIND, cache, say=quiet)
    assert len(os.listdir(cache)) == 3  # one bad file does not keep the others from being stored
    os.rename(files[2] + ".away", files[2])
    assert ids(open_source(files, cache_dir=cache, say=quiet)) == ALL
    assert scanned == ["2.jsonl"]


def test_in_spawned_processes_the_same(files, tmp_path):
    lines: list[str] = []
    one = index_files(files, scan_lines, LINES_KIND, str(tmp_path / "one"), workers=1, say=quiet)
    two = index_files(files, scan_lines, LINES_KIND, str(tmp_path / "two"), workers=2, say=lines.append)
    for a, b in zip(one, two, strict=True):
        assert a.path == b.path and a.scan.samples == b.scan.samples
        assert all(np.array_equal(a.scan.arrays[name], b.scan.arrays[name]) for name in a.scan.arrays)
        stored = [Path(index.stored_at).read_bytes() for index in (a, b)]
        assert stored[0] == stored[1]
    assert len(lines) == 1 and lines[0].startswith("indexed 4 of 4 files, 0.00 of 0.00 GB, ")


def test_an_index_that_another_process_made_meanwhile_is_taken(files, tmp_path):
    """Ranks that start together build the same indexes; a mapped one is not replaced under its readers."""
    cache = str(tmp_path / "cache")
    (first,) = index_files(files[:1], scan_lines, LINES_KIND, cache, say=quiet)
    inode = os.stat(first.stored_at).st_ino
    again = index_build._index_one(scan_lines, first.path, LINES_KIND, first.stored_at)
    assert again.stored_at == first.stored_at and os.stat(first.stored_at).st_ino == inode

    def slow_scan(path: str) -> Scan:
        index_files(files[1:2], scan_lines, LINES_KIND, cache, say=quiet)
        return scan_lines(path)

    (second,) = index_files(files[1:2], slow_scan, LINES_KIND, cache, say=quiet)
    assert second.scan.samples == 2 and not [name for name in os.listdir(cache) if name.endswith(".tmp")]


def test_an_index_older_than_its_data(files, tmp_path, scanned):
    cache, said = str(tmp_path / "cache"), []
    open_source(files, cache_dir=cache, say=quiet)
    jsonl(tmp_path / "1.jsonl", [{"id": "new", "text": "x"}] * 5)
    with pytest.raises(
        DataError, match=r"1.jsonl: its index .* is older than its data \(.* bytes then, .* now\)"
    ):
        open_source(files, cache_dir=cache, if_stale="refuse", say=quiet)
    source = open_source(files, cache_dir=cache, say=said.append)
    assert ids(source)[1:6] == ["new"] * 5 and scanned[4:] == ["1.jsonl"]
    assert "is older than its data" in said[0] and said[0].endswith("making it anew")
    # the same size, another time
    os.utime(files[1], ns=(1, 1))
    with pytest.raises(DataError, match="written since.*if_stale = refuse"):
        open_source(files, cache_dir=cache, if_stale="refuse", say=quiet)
    with pytest.raises(ConfigError, match="if_stale = ignore: must be one of rebuild, refuse"):
        open_source(files, cache_dir=cache, if_stale="ignore")
    with pytest.raises(ConfigError, match="workers = 0"):
        open_source(files, cache_dir=cache, index_workers=0)


def test_every_damage_to_an_index_is_noticed(files, tmp_path, scanned):
    """Each byte of a small index flipped, and every length it can be cut to."""
    cache = str(tmp_path / "cache")
    (index,) = index_files(files[1:2], scan_lines, LINES_KIND, cache, say=quiet)
    stored = Path(index.stored_at)
    whole = stored.read_bytes()
    arrays = index.scan.arrays
    damaged = [whole[:length] for length in range(0, len(whole), 7)] + [whole + b"x", bytes(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    unnoticed = 0
    for content in damaged:
        stored.write_bytes(content)
        try:
            again = load(index.stored_at, index.path, LINES_KIND, index.size, index.mtime_ns)
        except index_file.IndexUnusable:
            continue
        assert all(np.array_equal(arrays[name], again.scan.arrays[name]) for name in arrays)
        unnoticed += 1
    padding = len(whole) - 20 - int.from_bytes(whole[8:16], "little") - sum(a.nbytes for a in arrays.values())
    assert unnoticed == padding  # only what nobody reads
    assert ids(open_source(files[1], cache_dir=cache, say=quiet)) == ["1.0", "1.1"]


def test_a_corrupt_index_is_made_anew_and_this_is_said(files, tmp_path, scanned):
    cache, said = str(tmp_path / "cache"), []
    open_source(files, cache_dir=cache, say=quiet)
    stored = index_path(files[3], LINES_KIND, cache)
    with open(stored, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff")
    source = open_source(files, cache_dir=cache, if_stale="refuse", say=said.append)
    assert ids(source) == ALL and scanned[4:] == ["3.jsonl"]
    assert said[0] == f"index {stored} is damaged (array line does not match its checksum); making it anew"


def test_an_index_of_another_version_is_made_anew(files, tmp_path):
    cache, said = str(tmp_path / "cache"), []
    index_files(files[:1], scan_lines, "lines-0", cache, say=quiet)
    index_files(files[:1], scan_lines, LINES_KIND, cache, say=said.append)
    assert "is of kind lines-0 for" in said[0]


def test_refusals_are_stored_with_the_index(tmp_path):
    path = tar(tmp_path / "a.tar", [("../x.txt", b"x"), ("a.txt", b"x"), ("b.png", b"x"), ("a.cls", b"3")])
    seen = []
    for _ in range(2):
        source = open_source(path, cache_dir=str(tmp_path / "cache"), say=quiet)
        seen.append((source.refused(), source.refused_counts(), source.ignored_counts()))
    assert seen[0] == seen[1] and seen[0][1] == {"bad_member_name": 1, "no_text": 1, "duplicate_key": 1}
    assert [bad.line for bad in seen[0][0]] == [1, 3, 4]


def test_the_list_of_refusals_is_bounded_but_the_counts_are_not(monkeypatch):
    monkeypatch.setattr(index_file, "MOST_LISTED", 3)
    scan = Scan(0, {})
    for number in range(10):
        scan.refuse(BadSample("x", "f", number, "link", ""))
    assert len(scan.refused) == 3 and scan.counts == {"link": 10}


def test_arrays_are_mapped_and_sent_as_a_path(files, tmp_path):
    big = FileIndex(files[0], "k-1", 1, 2, Scan(3, {"a": np.arange(100_000), "e": np.empty(0, np.int64)}))
    store(big, str(tmp_path / "c" / "big.index"))
    index = load(str(tmp_path / "c" / "big.index"), files[0], "k-1", 1, 2)
    sent = pickle.dumps(index)
    assert len(sent) < 2_000 and len(pickle.dumps(big)) > 800_000
    copy = pickle.loads(sent)
    assert np.array_equal(copy.scan.arrays["a"], np.arange(100_000)) and len(copy.scan.arrays["e"]) == 0
    os.remove(tmp_path / "c" / "big.index")
    with pytest.raises(DataError, match="leave the cache folder alone during a run"):
        pickle.loads(sent)


def test_a_file_that_changes_during_the_run(files, tmp_path):
    for cache in (None, str(tmp_path / "cache")):
        source = open_source(files[:1], cache_dir=cache, say=quiet)
        with open(files[0], "ab") as file:
            file.write(b'{"text": "more"}\n')
        with pytest.raises(DataError, match="do not change data during a run"):
            source[0]
    source.close()
    os.remove(files[0])
    with pytest.raises(DataError, match="cannot be opened any more"):
        source[0]


def test_a_file_that_is_still_written(files, tmp_path):
    def scan_and_write(path: str) -> Scan:
        with open(path, "ab") as file:
            file.write(b"{}\n")
        return scan_lines(path)

    with pytest.raises(DataError, match="changed while it was indexed"):
        index_files(files[:1], scan_and_write, LINES_KIND, str(tmp_path / "cache"), say=quiet)
    assert not os.path.exists(tmp_path / "cache")


def test_progress_is_said_every_few_seconds(files, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(index_build, "_SECONDS_BETWEEN_LINES", 0.0)
    index_files(files, scan_lines, LINES_KIND, None, say=lines.append)
    assert [line.split(",")[0] for line in lines] == [f"indexed {n} of 4 files" for n in (1, 2, 3, 4)]


def dies(path: str) -> Scan:
    time.sleep(0.05)
    os._exit(1)


def test_a_process_that_is_killed_is_named(files, tmp_path):
    with pytest.raises(DataError, match="was ended, mostly for want of memory"):
        index_files(files, dies, LINES_KIND, None, workers=2, say=quiet)


def test_a_cache_folder_that_cannot_be_written(files, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="the index cannot be written"):
        open_source(files, cache_dir=str(tmp_path / "cache"), say=quiet)
