"""One sample through the first pass: what is dropped, what is cut out, what is written."""

import json

import numpy as np
import pytest

from megatron_vl.data.curate.benchmarks import Item
from megatron_vl.data.curate.decontaminate import build_index
from megatron_vl.data.curate.examine import BenchmarkImages, Examiner
from megatron_vl.data.curate.outcome import from_lines, to_lines
from megatron_vl.data.curate.perceptual_hash import perceptual_hash
from megatron_vl.data.curate.rules import Captions, Decontamination, Grounding, Mosaic
from megatron_vl.data.jsonl import RawLine
from tests.data.curate.made import chat, config_for, pair, picture, text


@pytest.fixture
def root(tmp_path):
    for number in range(12):
        picture(number).save(tmp_path / f"{number}.png")
    picture(99, (2000, 40)).save(tmp_path / "thin.png")
    return tmp_path


def examine(root, record, benchmarks=None, images=None, number=0, **sections):
    config = config_for(root, [b"{}"], **sections)
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    return Examiner(config, benchmarks, images).examine(RawLine("web.jsonl", 5, data), "web", number)


def page(*paths: str, **extra: object) -> dict:
    content = [{"type": "text", "text": "a page"}]
    for path in paths:
        content += [{"type": "image", "image": path}, {"type": "text", "text": f"about {path}"}]
    return {"id": "page", "content": content, **extra}


GONE = [f"gone{number}.png" for number in range(20)]


@pytest.mark.parametrize(
    ("good", "gone", "reason"),
    [(1, 9, None), (1, 10, "failed_images"), (0, 1, "failed_image"), (2, 18, None), (1, 18, "failed_images")],
)
def test_more_than_90_percent_failed_images_drop_a_page(root, good, gone, reason):
    """9 of 10 is not more than 90%; 10 of 11 and 18 of 19 are."""
    outcome = examine(root, page(*[f"{number}.png" for number in range(good)], *GONE[:gone]))
    assert outcome.reason == reason and outcome.failed == {"missing": gone} and outcome.images == good + gone
    if reason is None:
        assert [path for path, _, _ in outcome.removed] == GONE[:gone]
        paths = [part["image"] for part in outcome.record["content"] if part["type"] == "image"]
        assert paths == [f"{number}.png" for number in range(good)]
        texts = [part["text"] for part in outcome.record["content"] if part["type"] == "text"]
        assert len(texts) == 1 + good + gone  # texts stay


def test_a_conversation_is_dropped_for_any_refused_image(root):
    assert examine(root, chat("q", "a", "x", "0.png", "1.png")).reason is None
    outcome = examine(root, chat("q", "a", "x", "0.png", "../x.png"))
    assert outcome.reason == "failed_image" and "outside_root: ../x.png" in outcome.detail
    assert examine(root, chat("q", "a", "x", "thin.png")).reason == "aspect_ratio"


def test_documents_lose_refused_images_or_are_dropped(root):
    outcome = examine(root, page("0.png", "thin.png"))
    assert (
        outcome.reason is None
        and outcome.removed[0][:2] == ["thin.png", "aspect_ratio"]
        and outcome.failed == {}
    )
    assert examine(root, page("thin.png")).reason == "aspect_ratio"
    dropping = examine(root, page("0.png", "thin.png"), documents_with_refused_images="drop")
    assert dropping.reason == "aspect_ratio"
    grounded = page("0.png", "thin.png", objects=[{"point": [1, 1], "image": 0}])
    assert examine(root, grounded).reason == "aspect_ratio"  # its objects count images


def test_images_in_a_top_level_list_are_cut_out_in_place(root):
    record = {"id": "l", "text": "a <image> b <image> c", "images": ["0.png", "gone.png"], "kept": 1}
    outcome = examine(root, record)
    assert outcome.record == {
        "id": "l",
        "content": [
            {"type": "text", "text": "a "},
            {"type": "image", "image": "0.png"},
            {"type": "text", "text": " b "},
            {"type": "text", "text": " c"},
        ],
        "kept": 1,
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "broken_json"),
        (b"\xff", "not_utf8"),
        (b"[]", "not_an_object"),
        (b'{"id": "a"}', "missing_messages"),
        (b'{"id": "a", "text": "\\ud800"}', "bad_text"),
        (b'{"id": "a", "text": "x <image>"}', "image_count"),
    ],
)
def test_what_is_no_sample_is_counted_by_its_reason(root, line, reason):
    outcome = examine(root, line)
    assert outcome.reason == reason and outcome.line == 5
    assert outcome.id == ("a" if line.startswith(b'{"id"') else "web.jsonl:5")


def test_untouched_samples_are_not_rewritten(root):
    assert examine(root, page("0.png")).record is None
    assert examine(root, chat("q", "a", "x")).record is None


def test_overlap_and_benchmark_images(root):
    index, _ = build_index([Item("b:1", "What is shown on this chart?")], 64, 1)
    sections = {"decontamination": Decontamination(enabled=True, images=True)}
    outcome = examine(root, chat("What is shown on this chart?", "a dog", "x", "0.png"), index, **sections)
    assert (outcome.reason, outcome.benchmark_item) == ("exact_overlap", "b:1")
    images = BenchmarkImages(
        np.array([perceptual_hash(picture(3, (400, 300)))], dtype=np.uint64), ["bench/3.png"]
    )
    outcome = examine(root, pair("3.png", "c", "x"), index, images, **sections)
    assert (outcome.reason, outcome.benchmark_item) == ("benchmark_image", "bench/3.png")
    assert examine(root, pair("4.png", "c", "x"), index, images, **sections).reason is None


def test_chosen_captions_are_written_and_judged(root):
    def candidate(path, *captions):
        part = {"type": "image", "image": path, "captions": [{"text": t, "score": s} for t, s in captions]}
        return {"id": "c", "content": [part], "alt": 1}

    rule = {"captions": Captions(enabled=True, min_score=0.2)}
    outcome = examine(root, candidate("0.png", ("bad", 0.1), ("good", 0.3)), **rule)
    assert [part.get("text") for part in outcome.record["content"]] == [None, "good"]
    assert outcome.record["alt"] == 1 and outcome.record["caption_candidates"][0]["chosen"] == 1
    assert examine(root, candidate("0.png", ("bad", 0.1)), **rule).reason == "no_caption"
    assert examine(root, candidate("0.png", ("z" * 300, 0.9)), **rule).reason == "character_run"
    assert examine(root, candidate("0.png", ("an <image> here", 0.9)), **rule).reason is not None
    assert examine(root, candidate("0.png", ("ok", "high")), **rule).reason == "bad_captions"
    off = examine(root, candidate("0.png", ("ok", 0.5)))
    assert off.reason is None and off.record is None and off.edits == {"images_with_captions_not_read": 1}


def test_objects_are_converted_and_shown(root):
    record = pair("0.png", "the dog at <object:0>", "g", objects=[{"label": "dog", "box": [16, 12, 80, 60]}])
    rule = {"grounding": Grounding(enabled=True, coordinate_convention="0-1000")}
    outcome = examine(root, record, **rule)
    assert outcome.record["content"][1]["text"] == "the dog at [100, 100, 500, 500]"
    assert outcome.record["objects"] == [{"label": "dog", "box": [100, 100, 500, 500], "image": 0}]
    record["objects"][0]["box"][2] = 161
    assert examine(root, record, **rule).reason == "bad_objects"


def test_who_may_go_into_a_mosaic(root):
    rule = {"mosaic": Mosaic(enabled=True, probability=1.0)}
    assert examine(root, pair("0.png", "c", "x"), **rule).pair.size == [160, 120]
    for record in (
        page("0.png", "1.png"),
        chat("q", "a", "x", "0.png"),
        {"text": "words only"},
        {"content": [{"type": "image", "image": "0.png"}]},
    ):
        assert examine(root, record, **rule).pair is None
    unread = examine(root, pair("0.png", "c", "x", objects=[{"point": [1, 1]}]), **rule)
    assert unread.pair is None and unread.edits == {"records_with_objects_not_read": 1}
    assert examine(root, pair("0.png", "c", "x"), mosaic=Mosaic(enabled=True, probability=0.0)).pair is None


def test_outcomes_survive_being_stored(root):
    rule = {"mosaic": Mosaic(enabled=True, probability=1.0)}
    outcomes = [examine(root, pair("0.png", text(5, 1), "\u00fc\u2028x"), **rule), examine(root, b"{")]
    assert list(from_lines(b"".join(to_lines(outcomes)).splitlines())) == outcomes
