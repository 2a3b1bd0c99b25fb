"""Random access to lines over several files, and the log of bad samples."""

import hashlib
import json
import pickle
from types import SimpleNamespace

import pytest

from megatron_vl.config.schema import RunConfig
from megatron_vl.data import jsonl
from megatron_vl.data.bad_samples import BadSample, BadSampleLog
from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.training import sample_order
from megatron_vl.errors import DataError


def test_lines_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 7)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(b'{"a": 1}\n\n  \r\n{"b": "\xe2\x80\xa8 x"}\r\n')
    two.write_bytes(b'{"c": 3}\n{"d": "last line has no newline"}')
    source = JsonlSource([str(one), str(two)])
    lines = [source[number] for number in (3, 0, 2, 1)]
    assert [json.loads(line.data) for line in lines] == [
        {"d": "last line has no newline"},
        {"a": 1},
        {"c": 3},
        {"b": "\u2028 x"},
    ]
    assert [(line.source, line.line) for line in lines] == [
        (str(two), 2),
        (str(one), 1),
        (str(two), 1),
        (str(one), 4),
    ]
    assert lines[3].default_id == "one.jsonl:4"
    assert len(source) == 4 and [file["samples"] for file in source.describe()] == [2, 2]
    with pytest.raises(IndexError):
        source[4]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == lines[0]


def test_unusable_files(tmp_path):
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for path, message in (
        ("blank", "holds no sample"),
        ("empty", "holds no sample"),
        ("none", "No such file"),
    ):
        with pytest.raises(DataError, match=message):
            JsonlSource([str(tmp_path / f"{path}.jsonl")])
    with pytest.raises(DataError, match="no JSONL file"):
        JsonlSource([])


def test_file_that_shrinks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": 2}\n')
    source = JsonlSource([str(path)])
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(DataError, match="shorter than when it was indexed"):
        source[1]


def test_bad_sample_log(tmp_path):
    path = tmp_path / "run" / "bad_samples.jsonl"
    first = BadSample("a", "t.jsonl", 3, "truncated", "ü.jpg: cut off")
    second = BadSample("a", "t.jsonl", 4, "too_long", "9 tokens")
    log = BadSampleLog(str(path), write=True)
    assert log.add([first, first]) == [first]
    assert log.add([first, second]) == [second]
    assert log.by_reason == {"truncated": 1, "too_long": 1} and log.by_source == {"t.jsonl": 2}
    assert log.summary() == "2 bad samples: truncated 1, too_long 1"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"id": "a", "source": "t.jsonl", "line": 3, "reason": "truncated", "detail": "ü.jpg: cut off"},
        {"id": "a", "source": "t.jsonl", "line": 4, "reason": "too_long", "detail": "9 tokens"},
    ]
    with open(path, "a") as file:
        file.write('{"id": "killed while wr')
    resumed = BadSampleLog(str(path), write=True)
    third = BadSample("c", "t.jsonl", 9, "missing", "")
    assert resumed.add([second, third]) == [third] and resumed.total == 3
    assert len(path.read_text().splitlines()) == 3
    other_rank = BadSampleLog(str(tmp_path / "no"), write=False)
    assert other_rank.add([first]) == [first] and not (tmp_path / "no").exists()


def test_the_order_of_a_run_names_contents_and_not_places(tmp_path):
    """A copy is the same data; a letter changed at equal size is not."""
    said = []
    for folder, content in (("one", b'{"a": 1}\n'), ("copy", b'{"a": 1}\n'), ("edited", b'{"a": 2}\n')):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "a.jsonl"
        path.write_bytes(content)
        source = JsonlSource([str(path)])
        assert source.digests() == [hashlib.sha256(content).hexdigest()]
        loader = SimpleNamespace(micro_batches=SimpleNamespace(source=source))
        said.append(sample_order(RunConfig(), loader))
    assert said[0] == said[1] != said[2]
    assert (
        said[0].startswith("a.jsonl (1 samples, 9 bytes, sha256 ") and "with seed 1234 and 8 rows" in said[0]
    )
