"""Samples reach the model the same from every format: a tar gives the bits that plain files give."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.data.loader import Loader, MicroBatches, Place
from megatron_vl.data.order import SampleOrder
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.sources.megatron_bin import TokenRule
from megatron_vl.data.sources.open import open_source
from tests.data.sources.making import megatron_pair, quiet, record, tar
from tests.data.tiny import MODEL, chat, make_data, write_jsonl

NAMES = ["small.png", "wide.png", "cut.jpg"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_gives_the_batch_of_plain_files(tmp_path, workers):
    """Pictures too, and the one that is cut off is reported in both."""
    data = replace(make_data(tmp_path), seq_length=96, num_workers=workers)
    lines = [chat("what?", "that", name) for name in NAMES]
    files = open_source(write_jsonl(tmp_path / "a.jsonl", lines), say=quiet)
    members = []
    for number, name in enumerate(NAMES):
        suffix = name.split(".")[1]
        members.append((f"{number}.json", record(suffix, text="what?")))
        members.append((f"{number}.{suffix}", (tmp_path / name).read_bytes()))
    packed = open_source(tar(tmp_path / "a.tar", members), say=quiet, cache_dir=str(tmp_path / "c"))
    batches = []
    for source in (files, packed):
        order = SampleOrder(len(source), 1, shuffle=False)
        loader = Loader(MicroBatches(source, order, RowBuilder(data, MODEL), Place(), 3, 3), 0, 1)
        batches += loader.next_step()
        loader.close()
    one, two = batches
    assert torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(one.crop_pixels, two.crop_pixels)
    assert torch.equal(one.global_pixels, two.global_pixels) and one.num_images == 3
    assert [f.record.reason for f in one.failed] == [f.record.reason for f in two.failed] == ["truncated"]


def test_ids_of_a_tokenised_file_are_all_learnt(tmp_path):
    data = replace(make_data(tmp_path), seq_length=96, num_workers=0)
    source = open_source(megatron_pair(tmp_path, [[1, 2, 3], [4]]), token_rule=TokenRule.for_model(MODEL))
    builder = RowBuilder(data, MODEL)
    row, images = builder.build(source[0])
    assert row.ids.tolist() == [1, 2, 3] == row.labels.tolist() and images == []
    row, _ = builder.build(source[1])
    assert row.refused is not None and row.refused.reason == "no_loss_tokens"
