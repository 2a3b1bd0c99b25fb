"""Choice of captions by given scores."""

import pytest

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.curate.captions import caption_images, choose_caption


def candidates(*scores: float) -> list[dict]:
    return [{"text": f"t{number}", "score": score} for number, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "least", "expected"),
    [
        ((0.1, 0.3, 0.2), None, 1),
        ((0.3, 0.3), None, 0),
        ((0.29, 0.1), 0.3, None),
        ((0.3, 0.1), 0.3, 0),
        ((-5, -2), None, 1),
        ((), None, None),
    ],
)
def test_the_best_score_wins(scores, least, expected):
    assert choose_caption(candidates(*scores), least) == expected


@pytest.mark.parametrize(
    "bad",
    [
        "x",
        ["x"],
        [{"text": "a"}],
        [{"score": 1}],
        [{"text": " ", "score": 1}],
        [{"text": "a", "score": "1"}],
        [{"text": "a", "score": True}],
        [{"text": "a", "score": float("nan")}],
    ],
)
def test_bad_candidates_are_refused(bad):
    with pytest.raises(SampleRefused) as refusal:
        choose_caption(bad, None)
    assert refusal.value.reason == "bad_captions"


def test_captions_stand_behind_their_image_and_candidates_are_kept():
    content = [
        {"type": "text", "text": "page"},
        {"type": "image", "image": "a", "captions": candidates(0.1, 0.9)},
        {"type": "image", "image": "b"},
        {"type": "image", "image": "c", "captions": candidates(0.1)},
    ]
    done = caption_images({"id": "p", "content": content}, 0.5)
    assert done.record["content"] == [
        {"type": "text", "text": "page"},
        {"type": "image", "image": "a"},
        {"type": "text", "text": "t1"},
        {"type": "image", "image": "b"},
        {"type": "image", "image": "c"},
    ]
    assert [(entry["image"], entry["chosen"]) for entry in done.record["caption_candidates"]] == [
        (0, 1),
        (2, None),
    ]
    assert (done.chosen, done.without) == (1, 1)


def test_records_without_candidates_are_left_alone():
    assert caption_images({"text": "x"}, None) is None
    assert caption_images({"content": [{"type": "image", "image": "a"}]}, None) is None
