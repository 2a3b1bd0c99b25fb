"""Pages: reading order, captions, what is dropped, remote images, hostile nesting, encodings, links."""

import os
import time

import pytest

from megatron_vl.data.image_checks import resolve_under
from megatron_vl.data.sample import ImagePart, TextPart
from megatron_vl.data.sources.html_page import decode_page, read_page
from megatron_vl.data.sources.html_rules import HtmlRule, local_path
from megatron_vl.data.sources.html_tokens import EndTag, StartTag, Text, tokens
from megatron_vl.data.sources.open import open_source
from megatron_vl.data.sources.survey import survey
from megatron_vl.errors import DataError, ImageRefused
from tests.data.sources.making import png, reason_of, reasons

PAGE = """<!DOCTYPE html><html><head><title>T &amp; x</title><style>p {}</style></head><body>
<nav>menu <ul><li>a</ul></nav><h1>Cats</h1><p>One <b>two </b> words
 three<p>four &lt;image&gt;
<figure><img src="img/a%20b.png?x=1" alt=" A  cat "><figcaption>The cat</figcaption></figure>
<table><tr><td>a<td>b<td></tr><tr><td>c</table><pre>x
  y</pre> after <img src=http://e.com/x.png> end <img src="/abs/c.jpg">
<script>if (a<b) {"<p>no"}</script><div></p></section>tail"""


def page(text: str, **limits: object):
    return read_page(text, "p", "d", HtmlRule(**limits))


def test_reading_order_and_captions():
    sample = page(PAGE)
    assert sample.document == (
        TextPart("Cats\n\nOne two words three\n\nfour <image>\n"),
        ImagePart("d/img/a b.png"),
        TextPart("\nThe cat\n\na | b\n\nc\n\nx\n  y\n\nafter\n\nend\n"),
        ImagePart("abs/c.jpg"),
        TextPart("\ntail"),
    )
    first, second = sample.images_of_page
    assert (first.part, first.alt, first.figcaption) == (1, "A cat", "The cat")
    assert (first.above, first.below) == ("four <image>", "The cat")
    assert (second.part, second.alt, second.figcaption, second.above, second.below) == (
        3,
        "",
        "",
        "end",
        "tail",
    )
    assert sample.title == "T & x"
    assert [(source, reason) for source, reason, _ in sample.failed_images] == [
        ("http://e.com/x.png", "image_remote")
    ]
    assert sample.dropped == {"title": 1, "style": 1, "nav": 1, "script": 1}


def test_bad_nesting_is_tolerated():
    assert page("<div><nav>menu</div>text").document == (TextPart("text"),)
    assert page("</div></p><b><i>a</b></i><p>b</figure>").document == (TextPart("a\n\nb"),)
    assert page("<figure><figcaption>one</figure><img src=a.png>").images_of_page[0].figcaption == ""
    assert page("x<p" + " a" * 50).document == (TextPart("x"),)
    assert page("a < b <3 &lt; & &bogus; <").document == (TextPart("a < b <3 < & &bogus; <"),)


def test_tokens():
    text = "<A B='x>y' c=d C=2 e><!-- <b> --><?php x?></a x>t<textarea><b>&amp;</textarea><!doctype html>"
    assert list(tokens(text)) == [
        StartTag("a", {"b": "x>y", "c": "d", "e": ""}),
        EndTag("a"),
        Text("t"),
        StartTag("textarea"),
        Text("<b>&"),
        EndTag("textarea"),
    ]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("<div>", "too_deep"),
        ("<table><tr><td>", "too_deep"),
        ("<nav>", "too_deep"),
        ("<figure><figcaption>x", "too_deep"),
        ("<img src=a.png>", "too_many_images"),
        ("<p>x", "too_many_blocks"),
        ("<b><i>", "empty_page"),
        ("<!--", "empty_page"),
        ("<a ", "empty_page"),
        ("<a b='", "empty_page"),
        ("</div>", "empty_page"),
        ("<script>", "empty_page"),
        ("<", ""),
        ("&#", ""),
    ],
)
def test_bombs_end_quickly(unit, expected):
    """html.parser of Python 3.11.7 needs most of a minute for 64 KB of "<a ", and far more for what is here."""
    begin = time.process_time()
    try:
        page(unit * (300_000 // len(unit)))
        found = ""
    except DataError as refusal:
        found = refusal.reason
    assert found == expected and time.process_time() - begin < 5


def test_limits_are_where_they_say():
    deep = "<div>" * 50 + "x" + "</div>" * 50
    assert page(deep, max_depth=50).document and reason(deep, max_depth=49) == "too_deep"
    images = "<img src=a.png>" * 400
    assert len(page(images, max_images=400).images) == 400
    assert reason(images, max_images=399) == "too_many_images"
    assert page("<p>" * 1000 + "x", max_depth=3).document == (TextPart("x"),)  # p need not be closed


def reason(text: str, **limits: object) -> str:
    with pytest.raises(DataError) as caught:
        page(text, **limits)
    return caught.value.reason


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.png", "d/a.png"),
        (" ./a.png\n", "d/./a.png"),
        ("../up/a.png#top", "d/../up/a.png"),
        ("/site/a.png", "site/a.png"),
        ("a%2Fb.png", "d/a/b.png"),
        ("//cdn.example/a.png", "image_remote"),
        ("HTTPS://e.com/a.png", "image_remote"),
        ("file:///etc/passwd", "image_remote"),
        ("http%3A//e.com/a.png", "image_remote"),
        ("\\\\host\\share\\a.png", "image_remote"),
        ("data:image/png;base64,AAAA", "image_inline"),
        ("", "image_no_source"),
        ("?x=1", "image_no_source"),
        ("a%FF.png", "image_bad_path"),
        ("a%00.png", "image_bad_path"),
    ],
)
def test_image_sources(source, expected):
    try:
        assert local_path(source, "d") == expected
    except DataError as refusal:
        assert refusal.reason == expected


def test_share_of_failed_images():
    remote, local = '<img src="http://e.com/a.png">', "<img src=a.png>"
    assert len(page(remote * 9 + local).images) == 1  # 90% is not more than 90%
    assert reason(remote * 10 + local) == "failed_images"
    assert reason("text" + remote) == "failed_images"
    assert page("text" + remote, max_failed_image_ratio=None).document == (TextPart("text"),)
    assert page("<img data-src=late.png>").images == [ImagePart("d/late.png")]


def test_encodings():
    assert decode_page("ü".encode()) == "ü" and decode_page(b"\xef\xbb\xbfx") == "x"
    assert decode_page(b"\xff\xfe" + "ü".encode("utf-16-le")) == "ü"
    chinese = '<meta http-equiv="Content-Type" content="text/html; charset=gb2312">猫和狗在花园里'
    assert decode_page(chinese.encode("gb2312")) == chinese
    for data, expected in (
        (b"\xff", "not_utf8"),
        (b'<meta charset="utf-8">\xff', "not_utf8"),
        (b"<meta charset=rot13>\xff", "bad_encoding"),
        (b"<meta charset=nonsense>\xff", "bad_encoding"),
        (b"<meta charset=euc-jp>\xff", "bad_encoding"),
        (b"\xff\xfe\x00\xd8", "bad_encoding"),
    ):
        with pytest.raises(DataError) as caught:
            decode_page(data)
        assert caught.value.reason == expected, data


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    (root / "site" / "img").mkdir(parents=True)
    (root / "site" / "img" / "a.png").write_bytes(png())
    pages = {
        "b.html": b"<p>good<img src=img/a.png>",
        "a.htm": b"<p>out<img src=../../secret.png>",
        "sub/c.HTML": b"<p>good<img src=../img/a.png>",
        "latin.html": b"<p>\xe9",
        "large.html": b"x" * 1001,
        "none.html": b"",
        "note.txt": b"not a page",
    }
    for name, data in pages.items():
        (root / "site" / name).parent.mkdir(exist_ok=True)
        (root / "site" / name).write_bytes(data)
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "secret.html").write_text("secret")
    os.symlink(tmp_path / "secret.html", root / "site" / "link.html")
    os.symlink(root / "site" / "b.html", root / "site" / "same.html")
    os.mkfifo(root / "site" / "pipe.html")
    return root


def test_a_folder_of_pages(folder):
    source = open_source(folder / "site", html_rule=HtmlRule(max_bytes=1000))
    assert [source[n].default_id for n in range(len(source))] == [
        "a.htm", "b.html", "large.html", "latin.html", "none.html", "same.html", "sub/c.HTML"
    ]  # fmt: skip
    assert reasons(source) == ["", "", "page_too_large", "not_utf8", "empty_page", "", ""]
    assert source.refused_counts() == {"link": 1, "not_a_file": 1}
    assert {bad.id for bad in source.refused()} == {"link.html", "pipe.html"}
    assert survey(source).refused.total() == 5 and survey(source).kept == 4
    for number in (1, 6):
        sample = source[number].parse()
        assert resolve_under(folder, sample.images[0].path) == folder / "site" / "img" / "a.png"
    with pytest.raises(ImageRefused, match="outside_root"):
        resolve_under(folder, source[0].parse().images[0].path)
    single = open_source(folder / "site" / "b.html")
    assert len(single) == 1 and single[0].parse().document == source[1].parse().document
    (described,) = source.describe()
    assert described["samples"] == 7 and described["path"] == str(folder / "site")
    os.rename(folder / "site" / "b.html", folder / "site" / "d.html")
    (renamed,) = open_source(folder / "site").describe()
    assert {**renamed, "digest": ""} != renamed and renamed["digest"] != described["digest"]


def test_a_page_that_changes_is_refused(folder):
    source = open_source(folder / "site", "html")
    (folder / "site" / "b.html").write_text("<p>other")
    assert reason_of(source[1]) == "changed"
    os.remove(folder / "site" / "b.html")
    assert reason_of(source[1]) == "unreadable"


def test_folders_without_pages(tmp_path):
    for path, message in ((tmp_path, "no HTML page below"), (tmp_path / "none", "no such page")):
        with pytest.raises(DataError, match=message):
            open_source(path, "html")
