"""Parsing of lines: the accepted forms, and the exact reason for each kind of bad line."""

import json
from dataclasses import replace

import pytest

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.sample import ImagePart, Message, Sample, TextPart, parse_sample
from tests.data.tiny import MODEL, chat, make_data, refusal

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


def parse(record: object) -> Sample:
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parse_sample(data, "file.jsonl:3")


def test_forms_of_content():
    image_url = {"type": "image_url", "image_url": {"url": "b.png"}}
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": "a.png"}, image_url]
    sample = parse(
        {
            "id": 5,
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}, ANSWER],
        }
    )
    assert sample == Sample(
        "5",
        messages=(
            Message("system", (TextPart("s"),)),
            Message("user", (TextPart("a"), ImagePart("a.png"), ImagePart("b.png"))),
            Message("assistant", (TextPart("yes"),)),
        ),
    )
    assert [image.path for image in sample.images] == ["a.png", "b.png"]


def test_images_beside_the_text():
    sample = parse(
        {
            "images": ["1.png", {"path": "2.png"}, "3.png"],
            "messages": [
                {"role": "user", "content": "<image><image>\nboth?"},
                ANSWER,
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "this"}]},
                ANSWER,
            ],
        }
    )
    assert sample.id == "file.jsonl:3"
    assert sample.messages[0].parts == (ImagePart("1.png"), ImagePart("2.png"), TextPart("\nboth?"))
    assert sample.messages[2].parts == (ImagePart("3.png"), TextPart("this"))


def test_documents():
    assert parse({"id": "d", "text": "once"}) == Sample("d", document=(TextPart("once"),))
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "caption"}]
    assert parse({"id": "d", "content": parts}).document == (ImagePart("a.png"), TextPart("caption"))
    assert parse({"id": "d", "text": "see <image>", "images": ["a.png"]}).images == [ImagePart("a.png")]


def test_unicode_byte_order_mark_and_line_end():
    line = "\ufeff" + json.dumps({"id": "ü", "text": "日本語 😀\u2028x"}, ensure_ascii=False) + "\r"
    assert parse(line.encode()) == Sample("ü", document=(TextPart("日本語 😀\u2028x"),))


BAD_LINES = {
    "broken json": (b'{"id": "a", "messages": [', "broken_json"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "broken_json"),
    "endless nesting": (b"[" * 200_000, "broken_json"),
    "not utf-8": (b'{"id": "a", "text": "\xff\xfe"}', "not_utf8"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "not_utf8"),
    "a list": ([1, 2], "not_an_object"),
    "null": (b"null", "not_an_object"),
    "id of a wrong type": ({"id": {}, "text": "a"}, "bad_id"),
    "nothing": ({"id": "a", "conversations": []}, "missing_messages"),
    "messages null": ({"messages": None}, "missing_messages"),
    "no turns": ({"messages": []}, "missing_messages"),
    "messages and text": ({"messages": [USER, ANSWER], "text": "a"}, "missing_messages"),
    "turn is a string": ({"messages": ["hi"]}, "bad_message"),
    "turn without content": ({"messages": [{"role": "user"}]}, "bad_message"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "bad_message"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role"),
    "role is a list": ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role"),
    "empty text": ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "empty_message"),
    "empty parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]},
        "empty_message",
    ),
    "empty document": ({"text": ""}, "empty_message"),
    "video part": (
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]},
        "unknown_part",
    ),
    "part is a string": ({"messages": [{"role": "user", "content": ["hi"]}]}, "unknown_part"),
    "text part without text": ({"content": [{"type": "text"}]}, "bad_part"),
    "image is a number": ({"content": [{"type": "image", "image": 3}]}, "bad_part"),
    "image_url without url": ({"content": [{"type": "image_url", "image_url": {}}]}, "bad_part"),
    "images is a string": ({"text": "<image>", "images": "a.png"}, "bad_part"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "bad_text"),
    "image in an answer": (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
        "image_in_assistant",
    ),
    "more images than placeholders": ({"text": "<image> x", "images": ["a.png", "b.png"]}, "image_count"),
    "fewer images than placeholders": ({"text": "<image> <image>", "images": ["a.png"]}, "image_count"),
    "placeholder but no images": ({"text": "<image> x"}, "image_count"),
    "image part without path": ({"content": [{"type": "image"}]}, "image_count"),
}


@pytest.mark.parametrize("line, reason", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line(line, reason):
    with pytest.raises(SampleRefused) as refused:
        parse(line)
    assert refused.value.reason == reason
    assert refused.value.sample_id is not None


def test_any_depth_of_nesting_is_refused():
    for depth in range(50, 1050, 50):
        with pytest.raises(SampleRefused):
            parse(b'{"messages": ' + b"[" * depth + b"]" * depth + b"}")


def test_refusal_names_id_and_counts():
    with pytest.raises(SampleRefused) as refused:
        parse({"id": "s7", "text": "<image> x", "images": ["a.png", "b.png"]})
    assert refused.value.sample_id == "s7"
    assert refused.value.detail == "2 images in the list, but 1 placeholders in the text"


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> RowBuilder:
    folder = tmp_path_factory.mktemp("data")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "huge.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"\0\0\0\rIHDR"
        + (60_000).to_bytes(4, "big") * 2
        + b"\x08\x02\0\0\0"
        + b"\0" * 4
    )
    return RowBuilder(make_data(folder), MODEL)


BAD_SAMPLES = {
    "missing image": (chat("q", "a", "none.png"), "missing"),
    "outside the root": (chat("q", "a", "../other.png"), "outside_root"),
    "absolute path": (chat("q", "a", "/etc/hostname"), "outside_root"),
    "http url": (chat("q", "a", "http://example.com/a.png"), "remote"),
    "inline data": (chat("q", "a", "data:image/png;base64,AAAA"), "remote"),
    "empty file": (chat("q", "a", "empty.png"), "empty"),
    "text named jpg": (chat("q", "a", "text.jpg"), "unsupported_format"),
    "60000 x 60000": (chat("q", "a", "huge.png"), "too_many_pixels"),
    "placeholder in a question": (chat("say <im_patch>", "a"), "placeholder_in_text"),
    "crop token in a question": (chat("say <patch_newline>", "a"), "placeholder_in_text"),
    "chat token in an answer": (chat("q", "a<|im_end|>"), "placeholder_in_text"),
    "end of text in a document": ({"text": "a<|endoftext|>b"}, "placeholder_in_text"),
    "placeholder over two parts": (
        {"content": [{"type": "text", "text": "<im_"}, {"type": "text", "text": "start>"}]},
        "placeholder_in_text",
    ),
    "too long": (chat("q" * 200, "a"), "too_long"),
    "too many images": (chat("q", "a", *["small.png"] * 16), "too_long"),
    "no answer": ({"messages": [USER]}, "no_loss_tokens"),
}


@pytest.mark.parametrize("record, reason", BAD_SAMPLES.values(), ids=BAD_SAMPLES.keys())
def test_bad_sample(builder, record, reason):
    bad = refusal(builder, record)
    assert (bad.reason, bad.source, bad.line) == (reason, "lines.jsonl", 7)
    assert bad.id == record.get("id", "lines.jsonl:7")


def test_details_name_values(builder):
    assert "data.seq_length = 96" in refusal(builder, chat("q" * 200, "a")).detail
    assert "none.png" in refusal(builder, chat("q", "a", "none.png")).detail
    assert "<im_patch>" in refusal(builder, chat("say <im_patch>", "a")).detail


def test_limits_of_the_data_rules(builder):
    strict = RowBuilder(replace(builder.data, max_crops=1), MODEL)
    assert refusal(strict, chat("q", "a", "wide.png")).reason == "too_many_crops"
    strict = RowBuilder(replace(builder.data, max_aspect_ratio=1.2), MODEL)
    assert refusal(strict, chat("q", "a", "small.png")).reason == "aspect_ratio"
