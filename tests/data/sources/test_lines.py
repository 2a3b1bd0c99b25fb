"""JSONL and ShareGPT files through a stored index: the same lines as JsonlSource, strict conversion."""

import json

import pytest

from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.sample import ImagePart, Message, Sample, TextPart
from megatron_vl.data.sources.open import open_source
from megatron_vl.data.sources.sharegpt import ShareGptLine
from megatron_vl.errors import DataError
from tests.data.sources.making import jsonl, quiet, reason_of, reasons, sharegpt


def line(record: dict | bytes) -> ShareGptLine:
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    return ShareGptLine("s.jsonl", 3, data)


def test_the_same_lines_as_without_an_index(tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_bytes(b'{"text": "a"}\n\n  \r\n{"text": "\xe2\x80\xa8 x"}\r\n')
    two = jsonl(tmp_path / "two.jsonl", [{"id": "q", "text": "c"}, b'{"text": "last"}'])
    plain = JsonlSource([str(one), two])
    for _ in range(2):  # made, then loaded
        source = open_source([one, two], cache_dir=str(tmp_path / "cache"), say=quiet)
        lines = [source[number] for number in range(len(source))]
        assert [(x.source, x.line, x.data, x.default_id) for x in lines] == [
            (x.source, x.line, x.data, x.default_id) for x in map(plain.__getitem__, range(len(plain)))
        ]
        assert source.describe() == plain.describe()
        assert lines[2].parse() == Sample("q", document=(TextPart("c"),))
    with pytest.raises(IndexError):
        source[4]


def test_sharegpt_becomes_the_same_sample():
    record = sharegpt("<image>\nWhat?", "A cat.", id=7, image="cat.png", system="Be brief.")
    record["conversations"] += sharegpt("Sure?")["conversations"]
    assert line(record).parse() == Sample(
        "7",
        messages=(
            Message("system", (TextPart("Be brief."),)),
            Message("user", (ImagePart("cat.png"), TextPart("\nWhat?"))),
            Message("assistant", (TextPart("A cat."),)),
            Message("user", (TextPart("Sure?"),)),
            Message("assistant", (TextPart("yes"),)),
        ),
    )
    assert line(sharegpt("no image")).parse().id == "s.jsonl:3"


def test_four_hundred_images_in_one_sample():
    names = [f"{n}.png" for n in range(400)]
    for key in ("image", "images"):
        sample = line(sharegpt("<image>" * 400 + "count", **{key: names})).parse()
        assert [image.path for image in sample.images] == names
    assert reason_of(line(sharegpt("<image>" * 399, images=names))) == "image_count"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"id": "a", "messages": []}, "two_forms"),
        ({"id": "a"}, "missing_messages"),
        ({"conversations": []}, "missing_messages"),
        ({"conversations": {"from": "human"}}, "missing_messages"),
        ({"conversations": ["hi"]}, "bad_message"),
        ({"conversations": [{"from": "human"}]}, "bad_message"),
        ({"conversations": [{"from": "human", "value": None}]}, "bad_message"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "unknown_role"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown_role"),
        ({"conversations": [{"from": "human", "value": ""}]}, "empty_message"),
        (sharegpt("<image>"), "image_count"),
        (sharegpt("none", image="a.png"), "image_count"),
        (sharegpt("<image>", image="a.png", images=["a.png"]), "two_forms"),
        (sharegpt("<image>", images="a.png"), "bad_part"),
        (sharegpt("<image>", image=5), "bad_part"),
        (sharegpt("<image>", image=[5]), "bad_part"),
        (sharegpt("x", "<image>", image="a.png"), "image_in_assistant"),
        (sharegpt("x", system={"a": 1}), "bad_message"),
        ({"conversations": [{"from": "system", "value": "s"}], "system": "t"}, "two_forms"),
        (sharegpt("x", id=True), "bad_id"),
        (b'{"conversations": [{"from": "human", "value": "\\ud800"}]}', "bad_text"),
        (b'{"conversations": [{"from": "human", "value": "\xff"}]}', "not_utf8"),
        (b'{"conversations": [', "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b'{"conversations": [], "x": ' + b"[" * 900 + b"]" * 900 + b"}", "missing_messages"),
        (b"[1]", "not_an_object"),
    ],
)
def test_bad_sharegpt(record, reason):
    if reason == "two_forms" and "messages" in record:
        record = {**record, "conversations": [{"from": "human", "value": "x"}]}
    assert reason_of(line(record)) == reason


def test_a_refusal_carries_the_id_of_its_record(tmp_path):
    source = open_source(
        jsonl(tmp_path / "a.jsonl", [{"id": "mine", "conversations": 3}]), "sharegpt", say=quiet
    )
    with pytest.raises(DataError) as caught:
        source[0].parse()
    assert caught.value.sample_id == "mine"


def test_a_line_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vl.data.sources.lines.LARGEST_LINE_BYTES", 20)
    path = jsonl(tmp_path / "a.jsonl", [b'{"text": "a"}', b'{"text": "0123456789"}', b'{"text": "b"}'])
    source = open_source(path, say=quiet)
    assert [source[n].line for n in range(2)] == [1, 3] and len(source) == 2
    assert source.refused_counts() == {"text_too_large": 1} and source.refused()[0].line == 2
    with pytest.raises(DataError, match="every line has more than 20 bytes"):
        open_source(jsonl(tmp_path / "b.jsonl", [b"x" * 30]), say=quiet)


def test_bad_lines_do_not_touch_their_neighbours(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [sharegpt("a"), b'{"x": \xff', sharegpt("<image>"), sharegpt("b")])
    assert reasons(open_source(path, "sharegpt", say=quiet)) == ["", "not_utf8", "image_count", ""]
