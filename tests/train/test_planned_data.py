"""Data that are planned ahead by the first rank while the others wait."""

import json
from pathlib import Path

import pytest

from tests.train import on_ranks
from tests.train.tiny_run import load, make_files, read_lines, write_config

PACKED = "data.packing={enabled: true, pad_multiple: 8, look_ahead_rows: 8, index_workers: 0}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("data"))


def domain(name: str, path: Path, more: str = "weight: 1") -> str:
    return f"data.domains=[{{name: {name}, paths: [{path}], {more}}}]"


def test_packed_rows_are_trained_on_and_resumed(world, data, tmp_path):
    config = write_config(data, tmp_path / "run", micro_batch_size=1)
    keys = ["data.train=[]", domain("all", data / "train.jsonl"), PACKED, "data.seq_length=128"]
    seen = {}
    for layout, steps in (("dp2", 2), ("cp2", 3)):
        ranks = world.run(2, on_ranks.pretrain, load(config, layout, *keys, f"train.train_steps={steps}"))
        seen[layout] = ranks[0].printed
    assert "Data plan: 2 steps of 8 rows of 128 tokens, packed in multiples of 8" in seen["dp2"]
    assert "% full, work x" in seen["dp2"] and "resumed from" in seen["cp2"]
    plan = json.loads((tmp_path / "run" / "data_plan.json").read_text())
    assert plan["steps"] == 3 and plan["phases"][0]["domains"][0]["name"] == "all"
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3] and all(0.5 < r["rows_filled"] <= 1 for r in records)


def test_another_mixture_is_refused_on_resume(world, data, tmp_path):
    config = write_config(data, tmp_path / "run", micro_batch_size=1)
    keys = ["data.train=[]", PACKED, "data.seq_length=128"]
    world.run(
        1,
        on_ranks.pretrain,
        load(config, "1", *keys, domain("a", data / "train.jsonl"), "train.train_steps=1"),
    )
    other = load(config, "1", *keys, domain("b", data / "eval.jsonl"))
    (error,) = world.run(1, on_ranks.refused, other)
    assert "the sample order would change silently" in error and "mixture and packing" in error


def test_what_fails_on_the_first_rank_fails_on_all(world, data, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    config = write_config(data, tmp_path / "run", micro_batch_size=1)
    keys = ["data.train=[]", domain("none", tmp_path / "empty.jsonl"), PACKED, "data.seq_length=128"]
    errors = world.run(2, on_ranks.refused, load(config, "dp2", *keys))
    assert errors[0] == errors[1] and errors[0].startswith("DataError: ") and "empty.jsonl" in errors[0]
