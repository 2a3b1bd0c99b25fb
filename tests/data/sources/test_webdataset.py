"""Tar shards: which samples they hold, images by offset, and everything that a tar can do wrong."""

import io
import json
import os
import tarfile

import pytest

from megatron_vl.data.image_backend import PillowBackend
from megatron_vl.data.image_checks import open_image
from megatron_vl.data.sample import Message, TextPart
from megatron_vl.data.sources.locator import FileSlice, LocatedImage
from megatron_vl.data.sources.open import open_source
from megatron_vl.data.sources.survey import survey
from megatron_vl.errors import DataError, ImageRefused
from tests.data.sources.making import png, quiet, reason_of, reasons, record, sharegpt, special, tar


def shard(path, members, **more):
    return open_source(tar(path, members, **more), say=quiet)


def pairs(count: int) -> list[tuple[str, bytes]]:
    """Samples s0, s1, ... of a caption and an image."""
    return [member for n in range(count) for member in ((f"s{n}.txt", b"text %d" % n), (f"s{n}.png", png(n)))]


def kept(source) -> list[str]:
    return [source[n].key for n in range(len(source))]


def test_forms_of_samples(tmp_path):
    meta = {"url": "x", "width": 3, "caption": "in json"}
    source = shard(
        tmp_path / "a.tar",
        [
            special("d/", tarfile.DIRTYPE),
            ("d/chat.json", record("0.png", "d/chat.1.PNG")),
            ("d/chat.1.png", png(1)),
            ("d/chat.0.png", png(0)),
            ("gpt.jpg", png(2)),
            ("gpt.json", json.dumps(sharegpt("<image>?", id="own")).encode()),
            ("cap.json", json.dumps(meta).encode()),
            ("cap.txt", b" in txt\n"),
            ("cap.webp", png(3)),
            ("cap.cls", b"7"),
            ("only.json", json.dumps(meta).encode()),
            ("doc.json", b'{"text": "no image"}'),
        ],
    )
    first, gpt, cap, only, doc = (source[n].parse() for n in range(5))
    assert [image.path for image in first.images] == [
        f"{tmp_path}/a.tar/d/chat.0.png",
        f"{tmp_path}/a.tar/d/chat.1.png",
    ]
    assert first.id == "a.tar:d/chat"
    assert [image.bytes_at.read() for image in first.images] == [png(0), png(1)]
    assert gpt.id == "own" and gpt.images[0].bytes_at.read() == png(2)
    assert gpt.messages[1] == Message("assistant", (TextPart("yes"),))
    assert isinstance(cap.document[0], LocatedImage) and cap.document[1] == TextPart("\nin txt")
    assert only.document == (TextPart("in json"),) and doc.document == (TextPart("no image"),)
    assert source.refused_counts() == {} and source.ignored_counts() == {".cls": 1}


def test_images_are_read_in_place(tmp_path):
    """By bytes for the decoder of today, and as a file over the slice alone."""
    source = shard(tmp_path / "a.tar", pairs(3))
    backend = PillowBackend()
    for number in range(3):
        (image,) = source[number].parse().images
        place = image.bytes_at
        assert str(place) == f"{tmp_path / 'a.tar'}:{place.offset}:{len(png(number))}"
        assert backend.header(place.read()).size == (8, 6)
        with place.open() as file:
            assert open_image(file, 1000).size == (8, 6)
        with place.open() as file:
            assert file.read() == png(number) and file.read(1) == b""
            file.seek(-4, os.SEEK_END)
            assert file.read(100) == png(number)[-4:]
    with pytest.raises(ImageRefused, match="truncated"):
        FileSlice(place.path, place.offset, 10**6).read()
    for bad, reason in (
        (FileSlice(str(tmp_path), 0, 5), "not_a_file"),
        (FileSlice(str(tmp_path / "none"), 0, 5), "missing"),
        (FileSlice(place.path, 0, 0), "empty"),
    ):
        with pytest.raises(ImageRefused, match=reason):
            bad.open()


def test_four_hundred_images_in_order(tmp_path):
    turns = {
        "messages": [{"role": "user", "content": "<image>" * 400}, {"role": "assistant", "content": "x"}]
    }
    members = [(f"a.{n}.png", png(n, (n + 1, 1))) for n in reversed(range(400))]
    source = shard(tmp_path / "a.tar", [*members, ("a.json", json.dumps(turns).encode())])
    images = source[0].parse().images
    sizes = [PillowBackend().header(image.bytes_at.read()).size[0] for image in images]
    assert sizes == list(range(1, 401))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.json", record("1.png")), ("a.0.png", b"x")], "missing_member"),
        ([("a.json", record("../b.png")), ("a.png", b"x")], "missing_member"),
        ([("a.json", record("/etc/passwd"))], "missing_member"),
        ([("a.json", record("b.tar:0:512"))], "missing_member"),
        ([("a.json", record("0.png")), ("a.0.png", b"x"), ("a.1.png", b"x")], "image_count"),
        ([("a.json", record()), ("a.png", b"x")], "image_count"),
        ([("a.json", json.dumps(sharegpt("<image><image>")).encode()), ("a.png", b"x")], "image_count"),
        ([("a.json", b"{"), ("a.txt", b"x")], "broken_json"),
        ([("a.json", b"[]")], "not_an_object"),
        ([("a.json", b'{"width": 3}')], "missing_messages"),
        ([("a.json", b'{"caption": "\\ud800"}')], "not_utf8"),
        ([("a.json", b'{"messages": [], "conversations": []}')], "two_forms"),
        ([("a.txt", b"\xff"), ("a.png", b"x")], "not_utf8"),
        ([("a.txt", b" "), ("a.png", b"x")], "empty_message"),
    ],
)
def test_bad_samples(tmp_path, members, reason):
    source = shard(tmp_path / "a.tar", [*members, ("b.txt", b"good")])
    assert reasons(source) == [reason, ""]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([("../../x.txt", b"out")], "bad_member_name"),
        ([("/abs.txt", b"out")], "bad_member_name"),
        ([("d/../../x.txt", b"out")], "bad_member_name"),
        ([("..\\x.txt", b"out")], "bad_member_name"),
        ([("new\nline.txt", b"out")], "bad_member_name"),
        ([("bad.txt", b"x"), special("bad.png", tarfile.SYMTYPE, "/etc/passwd")], "link"),
        ([("bad.txt", b"x"), special("bad.png", tarfile.LNKTYPE, "s0.png")], "link"),
        ([special("bad.png", tarfile.CHRTYPE), ("bad.txt", b"x")], "special_member"),
        ([special("bad.png", tarfile.FIFOTYPE), ("bad.txt", b"x")], "special_member"),
        ([special("bad.png", b"S"), ("bad.txt", b"x")], "sparse_member"),
        ([("bad.txt", b"x"), ("bad.txt", b"y")], "duplicate_member"),
        ([("bad.txt", b"x"), ("bad.TXT", b"y")], "duplicate_member"),
        ([("s0.txt", b"again")], "duplicate_key"),
        ([("bad.png", b"x")], "no_text"),
        ([("bad.mp4", b"x")], "no_text"),
    ],
)
def test_bad_members_are_refused_and_the_rest_is_kept(tmp_path, bad, reason):
    members = pairs(3)
    source = shard(tmp_path / "a.tar", [*members[:4], *bad, *members[4:]])
    assert kept(source) == ["s0", "s1", "s2"] and reasons(source) == [""] * 3
    assert source.refused_counts() == {reason: 1}
    assert [(b.reason, b.line) for b in source.refused()] == [(reason, 3)] and source[2].line == 4
    assert survey(source).refused == {reason: 1} and survey(source).kept == 3
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]


def test_long_names_and_other_dialects(tmp_path):
    long = "d" * 120 + "/" + "n" * 130
    for number, format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        members = [(f"{long}.txt", b"one"), (f"{long}.png", png()), ("ü.txt", b"two"), ("./c.txt", b"three")]
        source = shard(tmp_path / f"{number}.tar", members, format=format)
        assert kept(source) == [long, "ü", "c"] and source[0].parse().images[0].bytes_at.read() == png()
    prefix = "p" * 90 + "/" + "n" * 80
    assert kept(shard(tmp_path / "u.tar", [(f"{prefix}.txt", b"x")])) == [prefix]


def headers(path) -> dict[str, int]:
    """Offset of the header of every member."""
    with tarfile.open(path) as file:
        return {member.name: member.offset for member in file.getmembers()}


def spoil(path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_damaged_header_costs_its_sample_only(tmp_path):
    path = tar(tmp_path / "a.tar", pairs(5))
    spoil(path, headers(path)["s2.txt"] + 20, b"damage")
    source = open_source(path, say=quiet)
    # what is left of s2 is an image without a text
    assert kept(source) == ["s0", "s1", "s3", "s4"]
    assert source.refused_counts() == {"bad_header": 1, "no_text": 1}
    assert source[2].parse().images[0].bytes_at.read() == png(3)
    spoil(path, 0, b"damage")
    assert kept(open_source(path, say=quiet)) == ["s1", "s3", "s4"]


def test_a_damaged_size_does_not_hide_the_rest(tmp_path):
    path = tar(tmp_path / "a.tar", pairs(3))
    spoil(path, headers(path)["s1.txt"] + 124, b"77777777777\0")
    source = open_source(path, say=quiet)
    assert kept(source) == ["s0", "s2"] and source.refused_counts()["bad_header"] == 1


@pytest.mark.parametrize("cut_in", ["body", "header", "behind"])
def test_truncated(tmp_path, cut_in):
    path = tar(tmp_path / "a.tar", pairs(4))
    at = headers(path)["s3.png"] + {"body": 520, "header": 100, "behind": 0}[cut_in]
    data = (tmp_path / "a.tar").read_bytes()[:at]
    (tmp_path / "a.tar").write_bytes(data)
    source = open_source(path, say=quiet)
    assert kept(source) == ["s0", "s1", "s2"] and reasons(source) == [""] * 3
    assert source.refused_counts() == {"truncated_member": 1}


def test_data_behind_the_end_mark(tmp_path):
    path = tar(tmp_path / "a.tar", pairs(1))
    with open(path, "ab") as file:
        file.write((tmp_path / "a.tar").read_bytes())
    source = open_source(path, say=quiet)
    assert kept(source) == ["s0"] and source.refused_counts() == {"after_end": 1}


def test_pax_headers_that_lie(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as file:
        for name, pax in (("a.txt", {"size": "9" * 15}), ("b.txt", {"path": "../../b.txt"}), ("c.txt", {})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 3, pax
            file.addfile(info, io.BytesIO(b"abc"))
    data = out.getvalue()
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match="no sample in this shard"):
        open_source(str(tmp_path / "a.tar"), say=quiet)  # the first member claims all that follows
    (tmp_path / "b.tar").write_bytes(data[3 * 512 + 512 :])
    source = open_source(str(tmp_path / "b.tar"), say=quiet)
    assert kept(source) == ["c"] and source.refused_counts() == {"bad_member_name": 1}


def test_files_that_are_no_shards(tmp_path):
    import gzip

    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    (tmp_path / "text.tar").write_bytes(b"no tar at all " * 100)
    (tmp_path / "packed.tar").write_bytes(gzip.compress(b"x" * 5000))
    tar(tmp_path / "none.tar", [("a.png", b"x")])
    for name, message in (
        ("empty", "0 bytes; a shard needs"),
        ("zeros", r"no sample in this shard \(no member\)"),
        ("text", "no sample in this shard .bad_header 1"),
        ("packed", "compressed with gzip"),
        ("none", r"no sample in this shard \(no_text 1\)"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / f"{name}.tar"), say=quiet)
    with pytest.raises(DataError) as caught:  # all bad files are named at once
        open_source([str(tmp_path / "empty.tar"), str(tmp_path / "zeros.tar")], say=quiet)
    assert len(str(caught.value).splitlines()) == 2


def test_a_text_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vl.data.sources.webdataset.LARGEST_TEXT_BYTES", 10)
    source = shard(tmp_path / "a.tar", [("a.txt", b"x" * 11), ("b.txt", b"x" * 10)])
    assert [reason_of(source[n]) for n in range(2)] == ["text_too_large", ""]
