"""Loading: views shared out, failures reported, the same samples in any layout, resuming, workers."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from megatron_vl.config.schema import DataConfig
from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.loader import Loader, MicroBatches, Place, eval_loader, train_loader
from megatron_vl.data.order import SampleOrder
from megatron_vl.data.rows import RowBuilder
from megatron_vl.errors import DataError
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_step, share_views
from tests.data.tiny import MODEL, chat, make_data, write_jsonl

IMAGES = [[], ["small.png"], ["wide.png"], ["small.png", "wide.png"], ["wide.png"], []]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("loader")
    records = [chat(f"What colour? {n}", "red", *images, id=f"s{n}") for n, images in enumerate(IMAGES)]
    config = make_data(folder)
    return replace(
        config, train=[write_jsonl(folder / "train.jsonl", records)], eval=[str(folder / "train.jsonl")]
    )


def ids_of(batches) -> list[str]:
    return [sample_id for batch in batches for sample_id in batch.sample_ids]


def test_same_samples_per_step_for_any_data_parallel_size(data):
    steps = {}
    for dp_size, micro_batch_size in ((1, 1), (1, 4), (2, 1), (4, 1), (2, 2)):
        for rank in range(dp_size):
            loader = train_loader(data, MODEL, Place(rank, dp_size), micro_batch_size, 4)
            for step in range(3):
                steps.setdefault((dp_size, micro_batch_size, step), []).extend(ids_of(loader.next_step()))
    for (dp_size, micro_batch_size, step), ids in steps.items():
        assert sorted(ids) == sorted(steps[1, 1, step]), (dp_size, micro_batch_size, step)
    assert sorted(id for step in range(3) for id in steps[1, 1, step]) == sorted(
        [f"s{n}" for n in range(6)] * 2
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_shares_of_a_whole_step_make_up_the_whole(data, workers):
    """Placement all: the views of the 3 micro-batches of a step together, over more ranks than a row has views."""
    data = replace(data, seq_length=64, num_workers=workers)
    whole = train_loader(replace(data, num_workers=0), MODEL, Place(), 2, 6)
    steps = [whole.next_step() for _ in range(2)]
    for size in (2, 5) if workers == 0 else (5,):
        loaders = [
            train_loader(data, MODEL, Place(vision_rank=rank, vision_size=size, whole_steps=True), 2, 6)
            for rank in range(size)
        ]
        for step in steps:
            shares = share_step([b.view_kinds for b in step], size, view_costs(MODEL), together=True)
            parts = [loader.next_step() for loader in loaders]
            for number, (batch, of_ranks) in enumerate(zip(step, shares, strict=True)):
                mine = [part[number] for part in parts]
                assert {one.fingerprint() for one in mine} == {batch.fingerprint()}
                found = [(len(one.crop_pixels), len(one.global_pixels)) for one in mine]
                kinds = [[batch.view_kinds[view] for view in share] for share in of_ranks]
                assert found == [(one.count(CROP), one.count(GLOBAL)) for one in kinds]
                assert torch.equal(torch.cat([one.crop_pixels for one in mine]), batch.crop_pixels)
                assert torch.equal(torch.cat([one.global_pixels for one in mine]), batch.global_pixels)
        for loader in loaders:
            loader.seek(1)
            assert ids_of(loader.next_step()) == ids_of(steps[1])
            loader.close()


def test_shares_of_views_make_up_the_whole(data):
    data = replace(data, seq_length=64)
    whole = train_loader(data, MODEL, Place(), 6, 6).next_step()[0]
    assert sorted(whole.view_kinds) == [CROP] * whole.num_crops + [GLOBAL] * 5
    assert whole.crop_pixels.shape == (whole.num_crops, 3, 56, 56) and whole.num_crops >= 6
    crops = {view: n for n, view in enumerate(v for v, kind in enumerate(whole.view_kinds) if kind == CROP)}
    globals_ = {
        view: n for n, view in enumerate(v for v, kind in enumerate(whole.view_kinds) if kind == GLOBAL)
    }
    for size in (2, 3, 16):
        for rank, share in enumerate(share_views(whole.view_kinds, size, view_costs(MODEL))):
            mine = train_loader(data, MODEL, Place(vision_rank=rank, vision_size=size), 6, 6).next_step()[0]
            assert mine.view_kinds == whole.view_kinds and mine.fingerprint() == whole.fingerprint()
            my_crops = [crops[view] for view in share if view in crops]
            my_globals = [globals_[view] for view in share if view in globals_]
            assert torch.equal(mine.crop_pixels, whole.crop_pixels[my_crops])
            assert torch.equal(mine.global_pixels, whole.global_pixels[my_globals])


def test_ranks_without_tower_decode_nothing(data, monkeypatch):
    loader = train_loader(data, MODEL, Place(vision_rank=None), 6, 6)
    monkeypatch.setattr(loader.micro_batches.builder, "_decode", None)
    batch = loader.next_step()[0]
    assert batch.num_images == 5 and len(batch.crop_pixels) == len(batch.global_pixels) == 0


def test_resume_at_any_step(data):
    straight = train_loader(data, MODEL, Place(), 2, 4)
    batches = [straight.next_step() for _ in range(5)]
    resumed = train_loader(data, MODEL, Place(), 2, 4, start_step=3)
    for step in (3, 4):
        assert resumed.step == step
        for one, other in zip(batches[step], resumed.next_step(), strict=True):
            assert one.sample_ids == other.sample_ids and torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.crop_pixels, other.crop_pixels)
    resumed.seek(0)
    assert ids_of(resumed.next_step()) == ids_of(batches[0])


def test_evaluation_set_is_filled_up_and_repeats(data):
    ranks = [eval_loader(data, MODEL, Place(rank, 2), 1, 4, num_samples=5) for rank in range(2)]
    for _ in range(2):
        steps = [[batch for step in loader for batch in step] for loader in ranks]
        assert [ids_of(step) for step in steps] == [["s0", "s2", "s4", ""], ["s1", "s3", "", ""]]
        filler = steps[1][2]
        assert filler.num_loss_tokens == 0 and filler.refused == [] and filler.doc_lengths == [0]
        for loader in ranks:
            loader.seek(0)


def test_bad_samples_keep_their_place(data, tmp_path):
    records = [
        chat(id="good"),
        b'{"id": "broken", ',
        chat("q", "a", "none.png", id="no file"),
        chat("q", "a", "small.png", "cut.jpg", id="cut off"),
        chat("q", "a", "wide.png", id="fine"),
    ]
    data = replace(data, eval=[write_jsonl(tmp_path / "bad.jsonl", records)], seq_length=64)
    batch = eval_loader(data, MODEL, Place(), 5, 5).next_step()[0]
    assert batch.sample_ids == ["good", "bad.jsonl:2", "no file", "cut off", "fine"]
    assert [(bad.id, bad.line, bad.reason) for bad in batch.refused] == [
        ("bad.jsonl:2", 2, "broken_json"),
        ("no file", 3, "missing"),
    ]
    assert [(bad.document, bad.record.id, bad.record.reason) for bad in batch.failed] == [
        (3, "cut off", "truncated")
    ]
    assert [len(row[row >= 0]) > 0 for row in batch.labels] == [True, False, False, True, True]
    zero = [not view.any() for view in (*batch.crop_pixels, *batch.global_pixels)]
    views_of_cut_image = sum(zero)
    assert views_of_cut_image >= 1 and not zero[-1]
    # Every rank of the vision group notices, whichever views of the image it holds, and nothing moves.
    for rank in range(2):
        mine = eval_loader(data, MODEL, Place(vision_rank=rank, vision_size=2), 5, 5).next_step()[0]
        assert mine.fingerprint() == batch.fingerprint()
        assert {bad.document for bad in mine.failed} <= {3}


def test_background_processes_give_the_same_and_their_death_is_an_error(data):
    inline = train_loader(data, MODEL, Place(), 1, 2)
    background = train_loader(
        replace(data, num_workers=2), MODEL, Place(), 1, 2, start_step=1, timeout_seconds=60
    )
    inline.seek(1)
    for _ in range(3):
        for one, other in zip(inline.next_step(), background.next_step(), strict=True):
            assert one.sample_ids == other.sample_ids and one.fingerprint() == other.fingerprint()
            assert torch.equal(one.crop_pixels, other.crop_pixels)
    background.seek(1)
    inline.seek(1)
    assert ids_of(inline.next_step()) == ids_of(background.next_step())
    for worker in background._data_loader._iterator._workers:
        os.kill(worker.pid, signal.SIGKILL)
    begin = time.monotonic()
    # PyTorch notices in one of three places, by chance
    said = r"DataLoader worker \(pid.* (exited unexpectedly|is killed)|a DataLoader worker ended"
    with pytest.raises(DataError, match=rf"step \d+ failed: ({said})"):
        for _ in range(20):
            background.next_step()
    assert time.monotonic() - begin < 30
    background.close()


class StuckBuilder(RowBuilder):
    """Never comes back, like a read from a lost file system."""

    def build(self, raw):
        time.sleep(120)


def test_stuck_worker_is_an_error(data):
    data = replace(data, num_workers=1)
    source = JsonlSource(data.train)
    stuck = MicroBatches(source, SampleOrder(len(source), 1), StuckBuilder(data, MODEL), Place(), 1, 2)
    loader = Loader(stuck, timeout_seconds=1)
    with pytest.raises(DataError, match="loading of step 0 failed: DataLoader timed out after 1 seconds"):
        loader.next_step()
    for worker in loader._data_loader._iterator._workers:
        worker.kill()
    loader.close()
