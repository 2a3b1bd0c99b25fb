"""Web pages as rows: images that cannot be used are left out and counted, and too many of them refuse the page."""

from dataclasses import replace

import pytest

from megatron_vl.data.curate.examine import Examiner
from megatron_vl.data.curate.rules import CurationConfig, Source
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.lengths_build import length_index
from megatron_vl.data.loader import Place
from megatron_vl.data.packed import DomainSources, PackedMicroBatches
from megatron_vl.data.plan_report import record_of, report_lines
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.sample import ImagePart, TextPart
from megatron_vl.data.sources.html_page import read_page
from megatron_vl.data.sources.html_rules import HtmlRule
from megatron_vl.data.sources.html_source import PageFile
from megatron_vl.data.sources.open import open_source
from megatron_vl.plan.vision_share import GLOBAL
from tests.data.planned import domain, plan_of
from tests.data.tiny import MODEL, make_data

GONE, REMOTE = '<img src="none.png">', '<img src="http://a.example/b.png">'
SMALL, WIDE, CUT = '<img src="small.png">', '<img src="wide.png">', '<img src="folder.png">'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    data = make_data(folder, seq_length=4096)
    (folder / "folder.png").mkdir()
    return data


def built(data, page: str, rule: HtmlRule = HtmlRule()):  # noqa: B008
    file = PageFile(f"{data.data_root}/page.html", 1, page.encode(), "page.html", rule)
    return RowBuilder(data, MODEL).build(file)


def test_a_missing_image_is_left_out_and_the_rest_is_as_if_it_had_never_been_there(data):
    row, images = built(data, f"<p>one{GONE}<p>two{WIDE}<p>three{CUT}{SMALL}<p>four")
    assert row.refused is None and row.left_out == ("missing", "not_a_file")
    assert [image.name.rpartition("/")[2] for image in images] == ["wide.png", "small.png"]
    without, _ = built(data, f"<p>one<p>two{WIDE}<p>three{SMALL}<p>four")
    assert row.ids.tolist() == without.ids.tolist() and row.view_kinds == without.view_kinds


def test_what_is_left_of_a_page():
    page = read_page(f"<p>one{SMALL}<p>two{WIDE}<p>three", "page", "")
    left = page.without_images({0: ("missing", "none")})
    assert left.document == (
        TextPart("one\n"),
        TextPart("\ntwo\n"),
        ImagePart("wide.png"),
        TextPart("\nthree"),
    )
    (image,) = left.images_of_page
    assert (image.part, image.source) == (2, "wide.png") and left.document[image.part] == ImagePart(
        "wide.png"
    )
    assert left.failed_images == (("small.png", "missing", "none"),)
    ends = read_page(f"{SMALL}<p>one{WIDE}", "page", "", HtmlRule(max_failed_image_ratio=None))
    assert ends.without_images({0: ("missing", ""), 1: ("missing", "")}).document == (TextPart("one"),)


@pytest.mark.parametrize(
    "page, reason",
    [
        (GONE * 9 + SMALL, ""),  # 9 of 10 are not more than 0.9
        (GONE * 10 + SMALL, "failed_images"),
        (REMOTE * 5 + GONE * 4 + SMALL, ""),  # both kinds count together
        (REMOTE * 5 + GONE * 5 + SMALL, "failed_images"),
        ("<p>text" + GONE, "failed_images"),
        (SMALL, ""),
    ],
)
def test_the_limit_is_that_of_the_recipe(data, page, reason):
    row, images = built(data, "<p>text" + page)
    assert (row.refused.reason if row.refused else "") == reason
    assert row.refused is not None or len(images) == 1


@pytest.mark.parametrize("failed", [8, 9, 10, 11])
def test_curation_decides_the_same(data, failed):
    """Of a document with one good image: the same share of failed ones is the limit, and the same images stay."""
    row, images = built(data, "<p>text" + GONE * failed + WIDE)
    names = ["none.png"] * failed + ["wide.png"]
    record = b'{"text": "text%s", "images": [%s]}' % (
        b"<image>" * len(names),
        b", ".join(b'"%s"' % name.encode() for name in names),
    )
    rules = CurationConfig(output="", sources=[Source("a", [])], data_root=data.data_root)
    outcome = Examiner(rules).examine(RawLine("a.jsonl", 1, record), "a", 0)
    assert (row.refused.reason if row.refused else None) == outcome.reason
    assert row.refused is not None or len(outcome.removed) == len(row.left_out) == failed


def test_without_a_limit_the_text_stays(data):
    row, images = built(data, "<p>text" + GONE * 3, HtmlRule(max_failed_image_ratio=None))
    assert row.refused is None and not images and len(row.left_out) == 3
    row, _ = built(data, GONE, HtmlRule(max_failed_image_ratio=None))
    assert row.refused.reason == "empty_page"


def test_left_out_images_are_counted_and_an_image_that_goes_later_refuses_its_page(data, tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    data = replace(data, data_root=str(tmp_path))
    make_data(folder)
    for number in range(6):
        image = "small.png" if number else "other.png"
        page = f'<p>page {number}<img src="{image}"><img src="wide.png"><img src="none{number}.png">'
        (folder / f"{number}.html").write_text(page)
    (folder / "small.png").rename(folder / "other.png")
    (folder / "small.png").write_bytes((folder / "other.png").read_bytes())
    source = open_source(folder, "html")
    index = length_index(tmp_path / "index", "text", source, data, MODEL)
    assert index.refused() == {} and index.left_out == {"missing": 6}
    plan = plan_of([index], num_steps=2, domains=(domain("text", weight=1.0),), global_batch_size=2)
    assert "  images that pages of domain text go without: missing 6" in report_lines(plan)
    assert record_of(plan)["left_out"] == {"text": {"missing": 6}}
    batches = PackedMicroBatches(DomainSources([source]), plan, RowBuilder(data, MODEL), Place())
    assert batches[0].view_kinds.count(GLOBAL) % 2 == 0 and not batches[0].refused
    (folder / "other.png").unlink()
    refused = [bad for step in range(4) for bad in batches[step].refused]
    assert (
        refused and {bad.id for bad in refused} == {"0.html"} and {b.reason for b in refused} == {"missing"}
    )
