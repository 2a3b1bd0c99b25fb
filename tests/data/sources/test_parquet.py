"""Tables: rows by number over row groups, images as bytes or paths, what is refused; skipped without pyarrow.

That a missing pyarrow is named is tested without it.
"""

import sys

import pytest

from megatron_vl.data.image_backend import PillowBackend
from megatron_vl.data.sample import ImagePart, Message, TextPart
from megatron_vl.data.sources.locator import LocatedImage
from megatron_vl.data.sources.open import open_source
from megatron_vl.data.sources.parquet import table_files
from megatron_vl.data.sources.table_rows import sample_of_row
from megatron_vl.errors import DataError
from tests.data.sources.making import png, quiet, reasons

USER = {"role": "user", "content": "<image>what?"}
ANSWER = {"role": "assistant", "content": "that"}


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'pyarrow>=15'"):
        open_source(str(tmp_path / "a.parquet"), say=quiet)


def test_an_old_pyarrow_is_refused(tmp_path, monkeypatch):
    import types

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    old = types.ModuleType("pyarrow")
    old.__version__ = "14.0.0"
    monkeypatch.setitem(sys.modules, "pyarrow", old)
    with pytest.raises(DataError, match="pyarrow 14.0.0 is installed; parquet files need 15"):
        open_source(str(tmp_path / "a.parquet"), say=quiet)


def test_rows_become_samples():
    blob = {"bytes": png(3), "path": "ignored.png"}
    sample = sample_of_row({"id": None, "messages": [USER, ANSWER], "images": [blob], "text": None}, "f:1")
    image = sample.messages[0].parts[0]
    assert sample.id == "f:1" and isinstance(image, LocatedImage) and image.path == "f:1 image 0"
    assert image.bytes_at == png(3) and PillowBackend().header(image.bytes_at).size == (8, 6)
    assert sample.messages[0].parts[1] == TextPart("what?") and sample.messages[1].parts == (
        TextPart("that"),
    )

    parts = [
        {"type": "image", "text": None, "image": {"bytes": None, "path": "a.png"}},
        {"type": "text", "text": "b", "image": None},
        {"type": "image", "text": None, "image": {"bytes": png(1), "path": None}},
    ]
    document = sample_of_row({"id": 5, "content": parts}, "f:2")
    assert document.id == "5" and document.document[:2] == (ImagePart("a.png"), TextPart("b"))
    assert document.document[2].bytes_at == png(1)

    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]
    for conversations in (
        turns,
        [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "yes"}],
    ):
        sample = sample_of_row({"conversations": conversations, "image": png(2), "images": None}, "f:3")
        assert sample.messages[0].parts[0].bytes_at == png(2)
        assert sample.messages[1] == Message("assistant", (TextPart("yes"),))
    by_column = {"from": ["human", "gpt"], "value": ["q", "a"]}
    assert [m.role for m in sample_of_row({"conversations": by_column}, "f:3").messages] == [
        "user",
        "assistant",
    ]
    assert sample_of_row({"text": "plain", "images": []}, "f:4").document == (TextPart("plain"),)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER, ANSWER]}, "image_count"),
        ({"messages": [USER, ANSWER], "images": [png(), png()]}, "image_count"),
        ({"messages": [USER, ANSWER], "images": [png()], "image": png()}, "two_forms"),
        ({"messages": [USER, ANSWER], "images": [{"bytes": None, "path": None}]}, "no_image_bytes"),
        ({"messages": [USER, ANSWER], "images": [{"height": 3}]}, "no_image_bytes"),
        ({"messages": [USER, ANSWER], "images": [7]}, "bad_part"),
        ({"messages": [USER, ANSWER], "images": ["\x00inline 5"]}, "bad_column"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "\x00inline 0"}]}]},
            "bad_column",
        ),
        ({"messages": [{"role": "user", "content": b"raw"}]}, "bad_column"),
        ({"text": b"bytes"}, "bad_column"),
        ({"text": "a", "content": [{"type": "text", "text": "b"}]}, "missing_messages"),
        ({"text": None}, "missing_messages"),
        ({"messages": [], "conversations": [{"from": "human", "value": "x"}]}, "two_forms"),
        ({"text": 5}, "bad_message"),
        ({"conversations": {"from": ["human"], "value": []}}, "bad_column"),
        ({"conversations": {"from": [], "value": []}}, "missing_messages"),
    ],
)
def test_bad_rows(row, reason):
    with pytest.raises(DataError) as caught:
        sample_of_row({"id": "mine", **row}, "f:1")
    assert caught.value.reason == reason and caught.value.sample_id == "mine"


def write(path, rows: list[dict], row_group_size: int = 2) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)


def rows(count: int) -> list[dict]:
    return [
        {"id": f"r{n}", "messages": [USER, ANSWER], "images": [{"bytes": png(n), "path": None}], "unread": n}
        for n in range(count)
    ]


def test_any_row_of_any_file(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", rows(5))
    write(tmp_path / "train-00001-of-00002.parquet", rows(3))
    for _ in range(2):  # indexed, then loaded
        source = open_source(tmp_path, cache_dir=str(tmp_path / "cache"), say=quiet)
        assert len(source) == 8 and [file["samples"] for file in source.describe()] == [5, 3]
        order = [7, 0, 4, 2, 6, 1, 4, 3, 5]
        for number in order:
            row = source[number]
            within = number if number < 5 else number - 5
            assert row.line == within + 1 and "unread" not in row.row
            sample = row.parse()
            assert sample.id == f"r{within}" and sample.images[0].bytes_at == png(within)
        source.close()
        assert source[0].parse().id == "r0"


def test_arrow_files_of_save_to_disk(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows(5))
    for name, new in (
        ("data-00000-of-00001", pyarrow.ipc.new_stream),
        ("data-00000-of-00001-ab", pyarrow.ipc.new_file),
    ):
        folder = tmp_path / name
        folder.mkdir()
        with new(str(folder / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        (folder / "state.json").write_text("{}")
        source = open_source(folder, say=quiet)
        assert [source[n].parse().id for n in (4, 0, 3)] == ["r4", "r0", "r3"]
        assert source[3].parse().images[0].bytes_at == png(3)
        source.close()


def test_bad_rows_of_a_file_do_not_touch_their_neighbours(tmp_path):
    bad = {"id": "bad", "messages": [USER, ANSWER], "images": [], "unread": 0}
    source = open_source(write(tmp_path / "a.parquet", [*rows(1), bad, *rows(1)]), say=quiet)
    assert reasons(source) == ["", "image_count", ""]


def test_files_that_cannot_be_used(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    whole = write(tmp_path / "whole.parquet", rows(4))
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-100])
    (tmp_path / "text.arrow").write_bytes(b"no arrow file")
    write(tmp_path / "columns.parquet", [{"question": "x", "answer": "y"}])
    for name, message in (
        ("empty.parquet", "not a readable table"),
        ("cut.parquet", "not a readable table"),
        ("text.arrow", "not a readable table"),
        ("columns.parquet", "none of the columns messages, .* has question, answer"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / name), say=quiet)
    monkeypatch.setattr("megatron_vl.data.sources.parquet.LARGEST_ROW_GROUP", 10)
    with pytest.raises(DataError, match="row group 0 has .* smaller row groups"):
        open_source(whole, say=quiet)


def test_damaged_pages_inside_a_file(tmp_path):
    path = write(tmp_path / "a.parquet", rows(4))
    source = open_source(path, say=quiet)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:200] = bytes(196)
    (tmp_path / "a.parquet").write_bytes(bytes(content))
    with pytest.raises(DataError, match="do not change data during a run"):
        source[0]
    with pytest.raises(DataError, match="not a readable table"):
        open_source(path, say=quiet)[0]


def test_a_folder_of_several_splits_is_refused(tmp_path):
    names = ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"]
    for name in names:
        (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="holds several splits or tables"):
        table_files([str(tmp_path)])
    assert table_files([str(tmp_path / names[0])]) == [str(tmp_path / names[0])]
    (tmp_path / names[1]).unlink()
    (tmp_path / "cache-0123.arrow").write_bytes(b"x")  # left by datasets.map
    assert table_files([str(tmp_path)]) == [str(tmp_path / names[0])]
