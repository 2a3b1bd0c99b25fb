"""Packed micro-batches: the planned documents with their pixels, bad samples, resuming on another DP size."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_vl.config.mixture import DomainConfig, DomainShare, MixturePhase, PackingConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.batch import pack
from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.lengths_build import length_index
from megatron_vl.data.loader import Place
from megatron_vl.data.make_plan import make_plan
from megatron_vl.data.packed import (
    DomainSources,
    PackedMicroBatches,
    open_plan,
    order_description,
    packed_loader,
)
from megatron_vl.data.plan_settings import PlanSettings, training_domains
from megatron_vl.data.rows import RowBuilder
from megatron_vl.errors import DataError
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.vision_share import GLOBAL, share_views
from tests.data.tiny import MODEL, chat, make_data, write_jsonl

IMAGES = [["small.png"], ["wide.png"], ["small.png", "wide.png"]]
STEPS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    make_data(folder)
    text = [chat("What colour? " + "and " * (n * n % 37), "red", id=f"t{n}") for n in range(700)]
    vqa = [chat("How many?" + "?" * (n % 11), "3", *IMAGES[n % 3], id=f"v{n}") for n in range(90)]
    vqa[5] = chat("q", "a", "none.png", id="v5")
    write_jsonl(folder / "text.jsonl", text)
    write_jsonl(folder / "vqa.jsonl", vqa)
    return folder


@pytest.fixture(scope="module")
def data(folder) -> DataConfig:
    return DataConfig(
        data_root=str(folder), tokenizer=str(folder / "text.model"), seq_length=256, num_workers=0
    )


def test_open_plan_is_what_a_run_calls(data, folder, tmp_path):
    """The first rank builds, the others find index and plan; nothing is written by them."""
    (domain,) = training_domains([str(folder / "text.jsonl")], [])
    packing = PackingConfig(enabled=True, pad_multiple=8, look_ahead_rows=24, index_workers=0)
    settings = PlanSettings.of(data, packing, [domain], [], MODEL, 4)
    source = JsonlSource(domain.paths)
    lines = []
    plans = [
        open_plan(settings, [source], data, packing, MODEL, tmp_path, 20, first, lines.append)
        for first in (True, False)
    ]
    assert [plans[0].step(s) for s in range(20)] == [plans[1].step(s) for s in range(20)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data_index", "data_plan"]
    assert "700 of 700 samples" in lines[0] and len(lines) == 1
    elsewhere = replace(packing, index_dir=str(folder / "index"))
    open_plan(settings, [source], data, elsewhere, MODEL, tmp_path / "b", 20, True, lines.append)
    assert (folder / "index" / "train.lengths").is_dir() and not (tmp_path / "b" / "data_index").exists()


def make(data, folder, place=Place(), num_steps=STEPS, phases=None, packing=None, size=4, **changes):  # noqa: B008
    domains = [
        DomainConfig("text", [str(folder / "text.jsonl")], "text", weight=1.0),
        DomainConfig("vqa", [str(folder / "vqa.jsonl")], weight=1.0),
    ]
    packing = packing or PackingConfig(enabled=True, pad_multiple=8, look_ahead_rows=24)
    phases = phases or [MixturePhase(tokens=80 * size * 256, text_share=0.7), MixturePhase(text_share=0.4)]
    sources = DomainSources([JsonlSource(domain.paths) for domain in domains])
    indices = [
        length_index(folder / "index", domain.name, source, data, MODEL)
        for domain, source in zip(domains, sources.sources)
    ]
    plan = make_plan(PlanSettings.of(data, packing, domains, phases, MODEL, size), indices, num_steps)
    return PackedMicroBatches(sources, plan, RowBuilder(data, MODEL), place, **changes)


def ids_of(batch) -> tuple[str, ...]:
    return tuple(sample_id for sample_id in batch.sample_ids if sample_id)


def test_a_micro_batch_is_the_planned_row(data, folder):
    batches = make(data, folder)
    builder = RowBuilder(data, MODEL)
    for item in (0, 9, 400):
        planned = batches.plan.step(item // 4)[item % 4]
        built = [builder.build(batches.source.at(d.domain, d.index)) for d in planned.documents]
        batch = batches[item]
        alone = pack([row for row, _ in built], 256, 8, MODEL.tokens.endoftext, 112, 56)
        assert torch.equal(batch.input_ids, alone.input_ids) and torch.equal(batch.labels, alone.labels)
        assert batch.cu_seqlens == alone.cu_seqlens and batch.view_kinds == alone.view_kinds
        assert all(bound % 8 == 0 for bound in batch.cu_seqlens) and len(batch.cu_seqlens) > 3
        assert ids_of(batch) == tuple(row.sample_id for row, _ in built if len(row.ids))
        assert len(batch.global_pixels) == batch.num_images and len(batch.crop_pixels) == batch.num_crops


def test_resume_in_the_middle_of_an_epoch_on_another_data_parallel_size(data, folder):
    """200 steps by sample id, over two phases and several epochs; stopped at 67 and 131."""

    def steps(dp_size, first, last):
        loaders = [
            packed_loader(make(data, folder, Place(rank, dp_size, None)), first) for rank in range(dp_size)
        ]
        found = []
        for step in range(first, last):
            assert all(loader.step == step for loader in loaders)
            rows = Counter(ids_of(batch) for loader in loaders for batch in loader.next_step())
            found.append(rows)
        return found

    straight = steps(1, 0, STEPS)
    pieces = steps(2, 0, 67) + steps(4, 67, 131) + steps(1, 131, STEPS)
    assert pieces == straight and all(sum(rows.values()) == 4 for rows in straight)
    seen = Counter(i for rows in straight for row in rows.elements() for i in row)
    assert max(seen.values()) > min(seen.values()) >= 1 and len(seen) == 789
    # and the plan itself, in order
    plan = make(data, folder).plan
    again = make(data, folder, num_steps=150).plan
    assert [plan.step(s) for s in range(150)] == [again.step(s) for s in range(150)]


def test_views_are_shared_out_over_the_vision_ranks(data, folder):
    whole = make(data, folder)
    item = next(n for n in range(320, 400) if whole[n].num_crops >= 4)
    batch = whole[item]
    for size in (2, 3):
        for rank, share in enumerate(share_views(batch.view_kinds, size, view_costs(MODEL))):
            mine = make(data, folder, Place(0, 1, rank, size))[item]
            assert mine.fingerprint() == batch.fingerprint()
            assert len(mine.global_pixels) == sum(batch.view_kinds[view] == GLOBAL for view in share)
            assert len(mine.global_pixels) + len(mine.crop_pixels) == len(share)


def test_bad_samples_are_reported_where_they_would_stand(data, folder):
    batches = make(data, folder)
    bad = [b for item in range(4 * 120) for b in batches[item].refused]
    assert {(b.id, b.line, b.reason) for b in bad} == {("v5", 6, "missing")}
    batch = next(batches[n] for n in range(400) if batches[n].refused)
    assert "v5" not in batch.sample_ids and batch.num_tokens > 100


def test_a_row_may_not_have_more_views(data, folder):
    packing = PackingConfig(enabled=True, pad_multiple=8, look_ahead_rows=24, max_global_views=1)
    batches = make(data, folder, packing=packing, num_steps=150)
    bad = Counter(b.reason for item in range(600) for b in batches[item].refused)
    assert set(bad) == {"missing", "too_many_views"}
    assert all(batches[item].num_images <= 1 for item in range(0, 600, 7))


@pytest.fixture
def copy(data, folder, tmp_path):
    """The data in a folder that a test may spoil, with built indices."""
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    data = replace(data, data_root=str(tmp_path), tokenizer=str(tmp_path / "text.model"))
    return data, tmp_path, make(data, tmp_path)


def item_with(batches, sample_id) -> int:
    return next(n for n in range(4 * STEPS) if sample_id in batches[n].sample_ids)


def test_an_image_of_another_size_is_an_error_that_names_the_sample(copy):
    _, folder, batches = copy
    item = item_with(batches, "v1")
    (folder / "wide.png").write_bytes((folder / "small.png").read_bytes())
    with pytest.raises(
        DataError, match=r"sample v\d+ \(.*vqa.jsonl:\d+\) of domain vqa has .* in its length index"
    ):
        batches[item]


def test_an_image_that_has_gone_is_refused_and_its_place_stays_empty(copy):
    _, folder, batches = copy
    item = item_with(batches, "v1")
    before = batches[item]
    (folder / "wide.png").unlink()
    after = batches[item]
    gone = set(ids_of(before)) - set(ids_of(after))
    assert "v1" in gone and {b.id for b in after.refused} >= gone
    assert {b.reason for b in after.refused} == {"missing"}


def test_an_image_that_has_come_back_has_no_place(copy):
    _, folder, batches = copy
    item = next(n for n in range(400) if batches[n].refused)
    before = batches[item]
    (folder / "none.png").write_bytes((folder / "small.png").read_bytes())
    after = batches[item]
    assert torch.equal(before.input_ids, after.input_ids)
    assert [(b.id, b.reason) for b in after.refused] == [("v5", "refused_when_indexed")]


def test_damaged_pixels_mask_their_document_only(copy):
    _, folder, batches = copy
    item = item_with(batches, "v1")
    whole = (folder / "wide.png").read_bytes()
    (folder / "wide.png").write_bytes(whole[: len(whole) - 60])
    batch = batches[item]
    assert batch.failed and {batch.sample_ids[f.document] for f in batch.failed} >= {"v1"}
    assert {f.record.id for f in batch.failed} == {batch.sample_ids[f.document] for f in batch.failed}


def test_loading_processes_give_the_same(data, folder):
    inline = packed_loader(make(data, folder, num_steps=92))
    background = packed_loader(make(replace(data, num_workers=2), folder, num_steps=92), timeout_seconds=120)
    inline.seek(90)
    background.seek(90)
    for _ in range(2):
        for one, other in zip(inline.next_step(), background.next_step(), strict=True):
            assert one.sample_ids == other.sample_ids and one.fingerprint() == other.fingerprint()
            assert torch.equal(one.crop_pixels, other.crop_pixels)
    background.close()


def test_the_last_step_of_an_epoch_is_filled_up(data, folder):
    """Rows without a document are legal micro-batches: one masked document."""
    phases = [MixturePhase(domains=[DomainShare("vqa", epochs=1)])]
    batches = make(data, folder, num_steps=None, phases=phases)
    loader = packed_loader(batches)
    found = [batch for step in loader for batch in step]
    assert Counter(i for batch in found for i in ids_of(batch)) == {f"v{n}": 1 for n in range(90) if n != 5}
    empty = [batch for batch in found if not ids_of(batch)]
    assert all(b.cu_seqlens == [0, 256] and b.doc_lengths == [0] and b.num_loss_tokens == 0 for b in empty)
    assert len(found) % 4 == 0 and len(found) == batches.plan.num_steps * 4


def test_dense_rows_of_a_mixture(data, folder):
    dense = PackingConfig()
    whole = make(data, folder, packing=dense, num_steps=30, micro_batch_size=4)
    batch = whole[7]
    assert batch.cu_seqlens is None and batch.input_ids.shape == (4, 256)
    ranks = [
        make(data, folder, Place(r, 2), packing=dense, num_steps=30, micro_batch_size=1) for r in range(2)
    ]
    for step in range(30):
        ids = [i for m in range(2) for rank in ranks for i in rank[2 * step + m].sample_ids]
        assert ids == whole[step].sample_ids
    assert sum(name.startswith("v") for step in range(30) for name in whole[step].sample_ids) > 5


def test_plain_training_files_are_one_domain(data, folder):
    (only,) = training_domains([str(folder / "text.jsonl")], [])
    assert (only.name, only.paths, only.weight) == ("train", [str(folder / "text.jsonl")], 1.0)
    assert training_domains(["a"], [only]) == (only,)


def test_what_must_not_change_before_a_run_is_resumed(data, folder):
    texts = [
        order_description(make(data, folder).plan),
        order_description(make(data, folder, num_steps=50).plan),
        order_description(make(replace(data, seed=5), folder).plan),
        order_description(make(data, folder, size=8).plan),
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert texts[0].startswith("text (700 samples), vqa (90 samples) with seed 1234, 4 packed rows of 256")


def test_wrong_index_is_not_used(copy):
    data, folder, _ = copy
    with open(folder / "vqa.jsonl", "ab") as file:
        file.write(json.dumps(chat(id="new")).encode() + b"\n")
    with pytest.raises(DataError, match="domain vqa does not belong to the data any more"):
        make(data, folder)
