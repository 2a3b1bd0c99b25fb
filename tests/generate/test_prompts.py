"""Prompts from conversations with image files."""

import hashlib
import json
from pathlib import Path

import pytest

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.sample import parse_sample
from megatron_vl.generate.prompts import PromptBuilder
from tests.data.tiny import MODEL, chat, make_data, raw


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("prompts"))


def sample(record: dict):
    return parse_sample(json.dumps(record).encode(), "x:1")


def test_a_prompt_and_its_images(data, tmp_path):
    record = chat("What colour?", "red", "wide.png", "small.png")
    prompt, images = PromptBuilder(data, MODEL).build(sample(record))
    row, _ = RowBuilder(data, MODEL).build(raw(record))
    assert prompt.ids == tuple(row.ids[: len(prompt.ids)].tolist()) and prompt.prompt_id == "q"
    assert prompt.view_kinds == row.view_kinds
    digests = [
        hashlib.sha256(Path(data.data_root, name).read_bytes()).hexdigest()
        for name in ("wide.png", "small.png")
    ]
    assert list(prompt.images) == digests == [image.digest for image in images]
    assert [image.plan.num_crops for image in images] == [3, 0]


def test_what_is_said_is_read_back(data):
    builder = PromptBuilder(data, MODEL)
    ids = [*builder.template.tokenizer.encode("The circle is red."), MODEL.tokens.chat_end]
    assert builder.text(ids) == "The circle is red.<|im_end|>"


@pytest.mark.parametrize(
    ("image", "told"), [("gone.png", "missing: .*gone.png"), ("../x.png", "outside_root: .*x.png")]
)
def test_bad_images_are_refused_by_name(data, image, told):
    with pytest.raises(SampleRefused, match=told):
        PromptBuilder(data, MODEL).build(sample(chat("What colour?", "red", image)))
