"""Exact ids and exact loss masks of conversations and documents."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_vl.config.model import SpecialTokens, VisionConfig
from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.crops import CropRule, num_image_tokens, plan_crops
from megatron_vl.data.sample import Sample, parse_sample
from megatron_vl.data.template import NOT_SCORED, Template, shift_labels
from megatron_vl.data.tokenizer import load_tokenizer, train_sentencepiece
from tests.data.tiny import MODEL, TEXTS, TOKENS

RULE = CropRule.for_model(112, 56)
NO_CROPS = plan_crops(40, 30, RULE)
TWO_ROWS = plan_crops(120, 120, RULE)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Template:
    path = str(tmp_path_factory.mktemp("template") / "text.model")
    train_sentencepiece(TEXTS, path, vocab_size=300)
    return Template(load_tokenizer(path, TOKENS, 512), TOKENS, MODEL.vision)


def sample(record: dict) -> Sample:
    return parse_sample(json.dumps(record).encode(), "x:1")


TWO_TURNS = sample(
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "3"},
            {"role": "user", "content": "colour?"},
            {"role": "assistant", "content": "<think>\nred\n</think>\n\nred ☂"},
        ]
    }
)
RENDERED = (
    "<|im_start|>system\nbe brief<|im_end|>\n"
    "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    "<|im_start|>user\ncolour?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\nred\n</think>\n\nred ☂<|im_end|>\n"
)


def scored_runs(template: Template, ids: np.ndarray, labels: np.ndarray) -> list[str]:
    """The scored stretches as text."""
    scored = labels != NOT_SCORED
    assert np.array_equal(labels[scored], ids[scored])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], scored.astype(int), [0]])))
    return [template.tokenizer.decode(ids[a:b], template.tokens) for a, b in zip(edges[::2], edges[1::2])]


def test_conversation_text(template):
    ids, labels = template.render(TWO_TURNS, [])
    assert ids.dtype == labels.dtype == np.int64 and ids.shape == labels.shape
    assert template.tokenizer.decode(ids, TOKENS) == RENDERED
    assert list(ids).count(TOKENS.think_start) == list(ids).count(TOKENS.think_end) == 1


@pytest.mark.parametrize(
    "loss_on, expected",
    [
        ("assistant", ["3<|im_end|>", "<think>\nred\n</think>\n\nred ☂<|im_end|>"]),
        ("assistant_last", ["<think>\nred\n</think>\n\nred ☂<|im_end|>"]),
        ("all_text", [RENDERED]),
    ],
)
def test_loss_only_where_asked(template, loss_on, expected):
    template = replace(template, loss_on=loss_on)
    assert scored_runs(template, *template.render(TWO_TURNS, [])) == expected


def test_header_is_never_merged_into_an_answer(template):
    """An answer that begins with a line break: generation starts after `assistant\\n`, so must training."""
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nred"}]}
    assert scored_runs(template, *template.render(sample(record), [])) == ["\n\nred<|im_end|>"]


def test_images_stand_where_they_are_written(template):
    record = {
        "messages": [
            {"role": "user", "content": "<image>left <image> right"},
            {"role": "assistant", "content": "red"},
        ],
        "images": ["a", "b"],
    }
    crop, patch_row = [TOKENS.patch_start, TOKENS.im_patch, TOKENS.patch_end], [TOKENS.patch_newline]
    whole = [TOKENS.im_start, *[TOKENS.im_patch] * 4, TOKENS.im_end]
    assert (TWO_ROWS.rows, TWO_ROWS.cols) == (2, 2)
    text = template.tokenizer.encode
    expected = [
        TOKENS.chat_start,
        *text("user\n"),
        *crop * 2,
        *patch_row,
        *crop * 2,
        *whole,
        *text("left "),
        *whole,
    ]
    expected += [*text(" right"), TOKENS.chat_end, *text("\n"), TOKENS.chat_start, *text("assistant\n")]
    expected += [*text("red"), TOKENS.chat_end, *text("\n")]
    for loss_on, scored in (
        ("assistant", ["red<|im_end|>"]),
        (
            "all_text",
            ["<|im_start|>user\n", "left ", " right<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"],
        ),
    ):
        template = replace(template, loss_on=loss_on)
        ids, labels = template.render(sample(record), [TWO_ROWS, NO_CROPS])
        assert ids.tolist() == expected
        assert scored_runs(template, ids, labels) == scored


@pytest.mark.parametrize("loss_on", ["assistant", "all_text"])
def test_document_scores_all_text(template, loss_on):
    template = replace(template, loss_on=loss_on)
    record = {
        "content": [
            {"type": "text", "text": "see "},
            {"type": "image", "image": "a"},
            {"type": "text", "text": "red"},
        ]
    }
    ids, labels = template.render(sample(record), [NO_CROPS])
    assert (
        template.tokenizer.decode(ids, TOKENS)
        == "see <im_start>" + "<im_patch>" * 4 + "<im_end>red<|endoftext|>"
    )
    assert scored_runs(template, ids, labels) == ["see ", "red<|endoftext|>"]


def test_released_counts(template):
    """83 tokens a crop, 171 for the global view, newlines between rows (preprocessing.md, 729x729)."""
    template = replace(template, tokens=SpecialTokens(), vision=VisionConfig())
    plan = plan_crops(729, 729)
    record = {"content": [{"type": "image", "image": "a"}, {"type": "text", "text": "x"}]}
    ids, labels = template.render(sample(record), [plan])
    assert num_image_tokens(plan) == 504
    expected = ([151689, *[151679] * 81, 151690] * 2 + [151691]) + [151689, *[151679] * 81, 151690] * 2
    assert ids[:504].tolist() == expected + [151680, *[151679] * 169, 151681]
    assert (labels[:504] == NOT_SCORED).all()


def test_nothing_to_learn_is_refused(template):
    for record, loss_on in (
        ({"messages": [{"role": "user", "content": "a"}]}, "assistant"),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
            "assistant_last",
        ),
    ):
        with pytest.raises(SampleRefused) as refused:
            replace(template, loss_on=loss_on).render(sample(record), [])
        assert refused.value.reason == "no_loss_tokens"


def test_shift():
    labels = np.array([NOT_SCORED, 5, NOT_SCORED, 7])
    assert shift_labels(labels).tolist() == [5, NOT_SCORED, 7, NOT_SCORED]
    assert shift_labels(labels[:0]).tolist() == []


@pytest.mark.parametrize("answer", ["red", "\n\nred", "<think>\nred\n</think>\n\nred", " ☂"])
@pytest.mark.parametrize("loss_on", ["assistant", "assistant_last", "all_text"])
def test_a_prompt_is_the_beginning_of_the_training_row(template, answer, loss_on):
    asked = {"role": "user", "content": "<image>left <image> right"}
    before = [{"role": "system", "content": "be brief"}, asked, {"role": "assistant", "content": "3"}]
    turns = [*before, {"role": "user", "content": "colour?"}]
    plans = [TWO_ROWS, NO_CROPS]
    prompt = template.render_prompt(sample({"messages": turns, "images": ["a", "b"]}), plans)
    whole = sample({"messages": [*turns, {"role": "assistant", "content": answer}], "images": ["a", "b"]})
    ids, _ = replace(template, loss_on=loss_on).render(whole, plans)
    assert prompt.dtype == np.int64 and ids[: len(prompt)].tolist() == prompt.tolist()
    assert template.tokenizer.decode(ids[len(prompt) :], TOKENS) == f"{answer}<|im_end|>\n"
    # the answer that a sample brings along is not part of its prompt
    assert template.render_prompt(whole, plans).tolist() == prompt.tolist()


def test_a_prompt_may_open_the_thinking(template):
    turns = [{"role": "user", "content": "How many?"}]
    plain, opened = (
        template.render_prompt(sample({"messages": turns}), [], think) for think in (False, True)
    )
    assert template.tokenizer.decode(opened, TOKENS).endswith("<|im_start|>assistant\n<think>\n")
    assert opened[: len(plain)].tolist() == plain.tolist()
    assert opened[len(plain)] == TOKENS.think_start


@pytest.mark.parametrize(
    "record", [{"text": "a document"}, {"messages": [{"role": "assistant", "content": "a"}]}]
)
def test_nothing_to_answer_is_refused(template, record):
    with pytest.raises(SampleRefused, match="no_prompt"):
        template.render_prompt(sample(record), [])
