"""The length index: exact, built in parallel, resumable, and an error when it is older than its data."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vl.config.schema import DataConfig
from megatron_vl.data import lengths_build
from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.lengths import (
    checksum,
    identity_of,
    index_folder,
    made_from,
    open_index,
    places_of,
    template_fingerprint,
    wait_for_index,
)
from megatron_vl.data.lengths_build import index_builder, length_index
from megatron_vl.data.rows import RowBuilder
from megatron_vl.errors import DataError
from megatron_vl.plan.vision_share import CROP, GLOBAL
from tests.data.tiny import MODEL, chat, make_data, write_jsonl

IMAGES = [[], ["small.png"], ["wide.png"], ["small.png", "wide.png"], ["none.png"], []]
COUNT = 40
ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path) -> DataConfig:
    records = [
        chat("What colour? " + "again " * (n % 7), "red", *IMAGES[n % 6], id=f"s{n}")
        for n in range(COUNT - 2)
    ]
    records += [b"{broken", chat("long " * 400, "red", id="long")]
    config = make_data(tmp_path)
    return replace(config, train=[write_jsonl(tmp_path / "train.jsonl", records)])


def build(data, tmp_path, **changes):
    return length_index(tmp_path / "index", "web/a b", JsonlSource(data.train), data, MODEL, **changes)


def folder_of(tmp_path):
    return index_folder(tmp_path / "index", "web/a b")


def test_lengths_are_those_of_the_rows(data, tmp_path):
    index = build(data, tmp_path)
    source, builder = JsonlSource(data.train), RowBuilder(data, MODEL)
    assert len(index) == COUNT and folder_of(tmp_path).parent == tmp_path / "index"
    for number in range(COUNT - 1):
        row, _ = builder.build(source[number])
        found = (index.tokens[number], index.globals_[number], index.crops[number], index.reason(number))
        reason = row.refused.reason if row.refused else ""
        assert found == (len(row.ids), row.view_kinds.count(GLOBAL), row.view_kinds.count(CROP), reason)
    assert index.tokens[COUNT - 1] > data.seq_length, "too long for a row is not for the index to say"
    assert index.refused() == {"missing": 6, "broken_json": 1}
    assert not (folder_of(tmp_path) / "parts").exists()


def test_opened_again_and_in_other_processes(data, tmp_path, monkeypatch):
    first = build(data, tmp_path)
    monkeypatch.setattr(lengths_build, "measure", None)
    again = build(data, tmp_path)
    travelled = pickle.loads(pickle.dumps(again))
    for index in (again, travelled):
        assert index.digest == first.digest and index.reason_names == first.reason_names
        for name in ("tokens", "globals_", "crops", "reasons"):
            assert np.array_equal(getattr(index, name), getattr(first, name))
    assert len(pickle.dumps(again)) < 1000, "mapped from the file, not copied"


def test_worker_processes_give_the_same_with_progress(data, tmp_path):
    alone = length_index(tmp_path / "alone", "a", JsonlSource(data.train), data, MODEL)
    lines = []
    shared = build(data, tmp_path, workers=2, chunk=7, say=lines.append)
    assert np.array_equal(alone.tokens, shared.tokens) and np.array_equal(alone.crops, shared.crops)
    assert alone.refused() == shared.refused() and alone.digest == shared.digest
    assert lines and "40 of 40 samples" in lines[-1]


def test_a_stopped_build_goes_on(data, tmp_path, monkeypatch):
    measured, whole = [], lengths_build.measure

    def stops(source, builder, start, stop, split):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(start)
        return whole(source, builder, start, stop, split)

    monkeypatch.setattr(lengths_build, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        build(data, tmp_path, chunk=8)
    description = made_from(JsonlSource(data.train), index_builder(data, MODEL))
    assert open_index(folder_of(tmp_path), "web/a b", description) is None
    later, lines = [], []
    monkeypatch.setattr(lengths_build, "measure", lambda *a, split: later.append(a[2]) or whole(*a))
    index = build(data, tmp_path, chunk=8, say=lines.append)
    assert (measured, later) == ([0, 8, 16], [24, 32]) and "24 of 40 samples were measured before" in lines[0]
    monkeypatch.undo()
    assert np.array_equal(
        index.tokens, length_index(tmp_path / "b", "b", JsonlSource(data.train), data, MODEL).tokens
    )


def test_a_stopped_build_of_other_data_starts_anew(data, tmp_path, monkeypatch):
    whole = lengths_build.measure
    monkeypatch.setattr(lengths_build, "measure", lambda *a, split: whole(*a) if a[2] < 16 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(data, tmp_path, chunk=8)
    monkeypatch.undo()
    with open(data.train[0], "ab") as file:
        file.write(json.dumps(chat(id="new")).encode() + b"\n")
    lines = []
    index = build(data, tmp_path, chunk=8, say=lines.append)
    assert len(index) == COUNT + 1 and "starting anew" in lines[0]


def test_an_index_older_than_its_data_is_an_error(data, tmp_path):
    build(data, tmp_path)
    path = data.train[0]
    with open(path, "ab") as file:
        file.write(json.dumps(chat(id="new")).encode() + b"\n")
    with pytest.raises(
        DataError, match=r"\.samples was 40, is 41; .* remove .*web%2Fa%20b.lengths to have it"
    ):
        build(data, tmp_path)
    with pytest.raises(DataError, match="files: 1 then, 2 now"):
        build(replace(data, train=data.train * 2), tmp_path)


def test_a_copy_with_other_times_is_the_same_data(data, tmp_path, monkeypatch):
    """It is compared once, and then believed; the run that continues on it has the same plan."""
    first = build(data, tmp_path)
    elsewhere = tmp_path / "copied"
    elsewhere.mkdir()
    for name in ("train.jsonl", "small.png", "wide.png"):
        shutil.copy(tmp_path / name, elsewhere / name)
    os.utime(elsewhere / "train.jsonl", ns=(1, 1))
    copy = replace(data, train=[str(elsewhere / "train.jsonl")], data_root=str(elsewhere))
    lines = []
    again = build(copy, tmp_path, say=lines.append)
    assert again.digest == first.digest and "comparing its contents" in lines[0]
    assert lines[-1].startswith("comparing domain web/a b: 40 of 40 samples")
    monkeypatch.setattr(lengths_build, "checksum", None)
    assert build(copy, tmp_path, say=lines.append).digest == first.digest and len(lines) == 2
    monkeypatch.undo()
    anew = length_index(tmp_path / "b", "web/a b", JsonlSource(copy.train), copy, MODEL)
    assert anew.digest == first.digest, "an index that is made from the copy says the same"


def test_a_copy_without_its_images_is_found(data, tmp_path):
    build(data, tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"sample 1 of domain web/a b has 0 tokens.*missing.*data\.data_root"):
        build(replace(data, data_root=str(empty)), tmp_path)


def test_an_edit_of_equal_size_is_found(data, tmp_path):
    """The very first and last sample too, by one letter; unless time was set back: then where it is trained on."""
    path = data.train[0]
    build(data, tmp_path)
    whole, before = Path(path).read_bytes(), os.stat(path).st_mtime_ns
    for number, old, new in ((0, b"What", b"Whet"), (21, b"s21", b"s91"), (39, b"red", b"rad")):
        lines = whole.splitlines(keepends=True)
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new, 1)
        Path(path).write_bytes(b"".join(lines))
        with pytest.raises(
            DataError, match=rf"sample {number} \(.*train.jsonl:{number + 1}\) has changed; a run"
        ):
            build(data, tmp_path)
    os.utime(path, ns=(before, before))
    index = build(data, tmp_path)
    source = JsonlSource(data.train)
    differs = [n for n in range(COUNT) if checksum(source[n]) != index.contents[n]]
    assert differs == [39]


def test_rules_are_part_of_the_identity_and_places_are_not(data):
    description = made_from(JsonlSource(data.train), index_builder(data, MODEL))
    shown = json.dumps(identity_of(description))
    assert str(data.data_root) not in shown and "changed_ns" not in shown and "max_crops" in shown
    places = places_of(description)
    assert places["data_root"] == data.data_root and places["files"][0]["path"] == data.train[0]


def test_two_processes_build_one_index(data, tmp_path, monkeypatch):
    """Each sample is measured by one of them only, and both get the same index; nothing is left behind."""
    index_dir = tmp_path / "shared"
    command = [sys.executable, "-m", "tests.data.builder", str(index_dir), data.train[0], data.tokenizer]
    other = subprocess.Popen([*command, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    mine, whole = [], lengths_build.measure

    def slowly(source, builder, start, stop, split):
        time.sleep(0.2)
        mine.append(stop - start)
        return whole(source, builder, start, stop, split)

    monkeypatch.setattr(lengths_build, "measure", slowly)
    while not (tmp_path / "ready").exists():
        assert other.poll() is None
        time.sleep(0.02)
    index = length_index(index_dir, "web/a b", JsonlSource(data.train), data, MODEL, chunk=8)
    answer = json.loads(other.communicate(timeout=120)[0].splitlines()[-1])
    assert sorted([answer["measured"], sum(mine)]) == [0, COUNT]
    assert answer["digest"] == index.digest == build(data, tmp_path).digest
    assert [path.name for path in index_dir.iterdir()] == ["web%2Fa%20b.lengths"]
    assert sorted(path.name for path in next(index_dir.iterdir()).iterdir()) == [
        "contents.npy",
        "index.json",
        "lengths.npy",
        "reasons.npy",
    ]


@pytest.mark.parametrize(
    "change",
    [{"loss_on": "all_text"}, {"boundary_rule": "lt"}, {"max_crops": 2}, {"apply_exif": False}],
)
def test_other_rules_are_an_error(data, tmp_path, change):
    build(data, tmp_path)
    with pytest.raises(DataError, match=f"rules.{next(iter(change))} was"):
        build(replace(data, **change), tmp_path)


def test_rules_that_decide_no_length_may_change(data, tmp_path):
    first = build(data, tmp_path)
    assert build(replace(data, seq_length=48, seed=9, num_workers=3), tmp_path).digest == first.digest


def test_the_fingerprint_sees_template_and_tokenizer(data):
    before = template_fingerprint(RowBuilder(data, MODEL))
    tokens = replace(MODEL.tokens, im_patch=MODEL.tokens.im_start, im_start=MODEL.tokens.im_patch)
    assert template_fingerprint(RowBuilder(data, replace(MODEL, tokens=tokens))) != before
    assert template_fingerprint(RowBuilder(replace(data, loss_on="all_text"), MODEL)) != before
    assert template_fingerprint(RowBuilder(data, MODEL)) == before


def test_damage_is_an_error(data, tmp_path):
    build(data, tmp_path)
    folder = folder_of(tmp_path)
    np.save(folder / "reasons.npy", np.zeros(3, dtype=np.uint8))
    with pytest.raises(DataError, match="damaged .*40 lengths and 3 reasons.* remove"):
        build(data, tmp_path)
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        build(data, tmp_path)


def test_the_others_wait_for_the_one_that_builds(data, tmp_path):
    description = made_from(JsonlSource(data.train), index_builder(data, MODEL))
    folder, now = folder_of(tmp_path), [0.0]
    (folder / "parts").mkdir(parents=True)

    def working(seconds):
        """A part every 400 s, and the index after the third."""
        now[0] += 400
        if now[0] > 1200:
            build(data, tmp_path)
        else:
            (folder / "parts" / f"{now[0]}.npz").touch()

    index = wait_for_index(folder, "web/a b", description, clock=lambda: now[0], sleep=working)
    assert len(index) == COUNT

    def silent(seconds):
        now[0] += seconds

    with pytest.raises(DataError, match="nobody has worked on this length index for 600 s"):
        wait_for_index(tmp_path / "none", "a", description, clock=lambda: now[0], sleep=silent)


class Empty(JsonlSource):
    def __init__(self):
        self.paths = []

    def __len__(self):
        return 0


def test_a_source_without_samples(data, tmp_path):
    with pytest.raises(DataError, match="domain a is empty: its files hold no sample"):
        length_index(tmp_path, "a", Empty(), data, MODEL)
