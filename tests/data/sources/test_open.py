"""One entry for all formats, and what every source promises: same samples in any order and in other processes."""

import importlib.util
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sources.gui import DEFAULT_SCHEMA
from megatron_vl.data.sources.locator import FileSlice, LocatedImage
from megatron_vl.data.sources.megatron_bin import TokenRule
from megatron_vl.data.sources.open import format_of, open_source
from megatron_vl.data.sources.record import Source, TokenSample
from megatron_vl.errors import ConfigError, DataError
from tests.data.sources.making import jsonl, megatron_pair, png, quiet, record, sharegpt, tar

HAVE_PYARROW = importlib.util.find_spec("pyarrow") is not None


def chat(n: int) -> dict:
    return {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}


def gui(n: int) -> dict:
    act = {"role": "assistant", "content": "", "action": {"name": "CLICK", "point": [n, n]}}
    return {"messages": [{"role": "user", "content": "go"}, act]}


def make(folder: Path, format: str) -> Source:
    """Two files of a format with nine samples, one of which is bad."""
    folder.mkdir(exist_ok=True)
    options = {"cache_dir": str(folder / "cache"), "say": quiet}
    if format == "html":
        for n in range(9):
            text = f"<p>page {n}<img src=i{n}.png>" if n != 4 else "<nav>"
            (folder / f"{n}.html").write_text(text)
        return open_source(folder, format, **options)
    if format == "megatron":
        paths = [
            megatron_pair(folder, [[n, 2, 3][: n + 1] for n in range(5)], name="a"),
            megatron_pair(folder, [[n, 100 if n == 2 else 1] for n in range(4)], name="b"),
        ]
        return open_source(paths, format, token_rule=TokenRule(100), **options)
    if format == "webdataset":
        members = [
            (f"s{n}.{end}", data)
            for n in range(9)
            for end, data in (("json", record("png")), ("png", png(n)))
        ]
        members[8] = ("s4.json", b"{")
        return open_source(
            [tar(folder / "a.tar", members[:10]), tar(folder / "b.tar", members[10:])], **options
        )
    if format == "parquet":
        import pyarrow
        from pyarrow import parquet

        rows = [
            {"text": f"<image>row {n}" if n != 4 else "", "images": [{"bytes": png(n)}]} for n in range(9)
        ]
        for name, part in (("a", rows[:5]), ("b", rows[5:])):
            parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=2)
        return open_source(folder, **options)
    build = {"jsonl": chat, "sharegpt": lambda n: sharegpt(f"q{n}"), "gui": gui}[format]
    records = [build(n) if n != 4 else b"{" for n in range(9)]
    paths = [jsonl(folder / "a.jsonl", records[:5]), jsonl(folder / "b.jsonl", records[5:])]
    schema = str(DEFAULT_SCHEMA) if format == "gui" else None
    return open_source(paths, format, action_schema=schema, **options)


FORMATS = ["jsonl", "sharegpt", "gui", "html", "webdataset", "megatron"] + ["parquet"] * HAVE_PYARROW


def content(source: Source, index: int) -> object:
    """All that a run would use of a sample, comparable between processes."""
    raw = source[index]
    where = (raw.source, raw.line, raw.default_id)
    try:
        sample = raw.parse()
    except SampleRefused as refusal:
        return where, refusal.reason, refusal.sample_id
    if isinstance(sample, TokenSample):
        return where, sample.id, sample.ids.tolist()
    places = [image.bytes_at for image in sample.images if isinstance(image, LocatedImage)]
    return where, sample, [place.read() if isinstance(place, FileSlice) else place for place in places]


def contents(source: Source, order: list[int]) -> dict[int, object]:
    return {index: content(source, index) for index in order}


@pytest.mark.parametrize("format", FORMATS)
def test_random_access_equals_reading_in_order(tmp_path, format):
    source = make(tmp_path / "data", format)
    assert len(source) == 9
    in_order = contents(source, list(range(9)))
    assert sum(
        len(found) == 3 and isinstance(found[1], str) and format != "megatron" for found in in_order.values()
    ) == (format != "megatron")
    assert (
        len({found[0][1:] + found[0][:1] for found in in_order.values()}) == 9
    )  # (source, line) names a sample
    source.close()
    assert contents(source, [8, 3, 0, 5, 4, 7, 1, 6, 2, 8]) == in_order
    assert contents(make(tmp_path / "data", format), [2, 7, 4]) == {n: in_order[n] for n in (2, 7, 4)}
    for index in (-1, 9):
        with pytest.raises(IndexError):
            source[index]
    described = source.describe()
    assert sum(file["samples"] for file in described) == 9 and json.dumps(described)
    assert all({"path", "bytes", "samples"} <= set(file) for file in described)
    assert make(tmp_path / "data", format).describe()[0]["bytes"] == described[0]["bytes"]


def test_spawned_workers_see_the_same(tmp_path):
    """With handles open in this process, which must not travel."""
    sources = {format: make(tmp_path / format, format) for format in FORMATS}
    here = {format: contents(source, [6, 0, 4, 8]) for format, source in sources.items()}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for format, source in sources.items():
            assert pool.submit(contents, source, [6, 0, 4, 8]).result(timeout=120) == here[format], format
    assert {format: contents(source, [6, 0, 4, 8]) for format, source in sources.items()} == here


def test_only_a_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vl.data.sources.files.MOST_OPEN_FILES", 3)
    paths = [jsonl(tmp_path / f"{n}.jsonl", [chat(n)]) for n in range(10)]
    source = open_source(paths, say=quiet)
    for _ in range(2):
        assert [source[n].parse().messages[0].parts[0].text for n in range(10)] == [
            f"q{n}" for n in range(10)
        ]
    assert len(source._handles) == 3 and all(not handle.closed for handle in source._handles.values())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jsonl"], "jsonl"),
        (["a.tar", "b.TAR"], "webdataset"),
        (["a.htm", "b.html"], "html"),
        (["a.bin", "a.idx"], "megatron"),
        (["a.parquet", "b.arrow"], "parquet"),
        (["d/x.html", "d/i.png", "d/readme.txt"], "html"),
        (["d/x.tar", "d/x.tar.gz"], "webdataset"),
    ],
)
def test_auto_goes_by_the_names(tmp_path, names, expected):
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"")
    folder = names[0].startswith("d/")
    assert (
        format_of([str(tmp_path / "d")] if folder else [str(tmp_path / name) for name in names]) == expected
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.csv"], "a.csv: no format is known by this name; known are .jsonl, .tar,"),
        (["a.tar.gz"], "a.tar.gz: compressed; unpack it"),
        (["a.jsonl", "b.tar"], "files of several formats .jsonl: .*a.jsonl; webdataset: .*b.tar"),
        ([], "no path: no format is known"),
    ],
)
def test_auto_says_what_it_does_not_know(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        open_source([str(tmp_path / name) for name in names], say=quiet)


def test_sharegpt_is_not_taken_for_openai(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [sharegpt("q")])
    with pytest.raises(DataError, match="its first line has the ShareGPT shape; give format = sharegpt"):
        open_source(path, say=quiet)
    assert len(open_source(path, "jsonl", say=quiet)) == 1  # asked for: refused line by line


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "json"}, ConfigError, "format = json: must be one of auto, jsonl, sharegpt"),
        ({"action_schema": "s.json"}, ConfigError, "is read for format gui only, this is jsonl"),
        (
            {"format": "gui", "action_schema": "none.json"},
            DataError,
            "none.json: not a readable action schema",
        ),
    ],
)
def test_bad_choices(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        open_source(jsonl(tmp_path / "a.jsonl", [chat(1)]), **options)


def test_files_that_are_missing_or_empty(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path, format, message in (
        (tmp_path / "none.jsonl", "auto", "none.jsonl: cannot be read .No such file"),
        (tmp_path / "empty.jsonl", "auto", "empty.jsonl: holds no sample"),
        (tmp_path / "folder", "jsonl", "no JSONL file below this folder; one must end in .jsonl"),
        (tmp_path / "folder", "webdataset", "no tar file below this folder"),
        (tmp_path / "folder", "megatron", "no .bin file below this folder"),
        (Path("/dev/null"), "jsonl", "/dev/null: neither a file nor a folder"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(path, format, token_rule=TokenRule(10) if format == "megatron" else None, say=quiet)
    with pytest.raises(DataError, match="no JSONL file is given"):
        open_source([], "jsonl")
