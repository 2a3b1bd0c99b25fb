"""Differences of configurations."""

from megatron_vl.config.changes import changed_keys
from megatron_vl.config.load import load_run

PHASE = "schedule.phases=[{tokens: 100, lr_start: 1e-3, lr_end: %s}]"


def config(*overrides: str):
    return load_run(overrides=["preset=step3_vl_tiny", *overrides]).config


def test_equal_configurations_have_no_changes():
    assert changed_keys(config(PHASE % "1e-4"), config(PHASE % "1e-4")) == []


def test_every_changed_value_is_named_with_both():
    before = config(PHASE % "1e-4", "train.micro_batch_size=2")
    now = config(PHASE % "1e-5", "data.train=[a.jsonl]", "train.micro_batch_size=4")
    assert changed_keys(before, now) == [
        "data.train: [] -> ['a.jsonl']",
        "schedule.phases[0].lr_end: 0.0001 -> 1e-05",
        "train.micro_batch_size: 2 -> 4",
    ]


def test_a_longer_list_is_one_change():
    now = "schedule.phases=[{tokens: 1, lr_start: 1, lr_end: 1}, {tokens: 1, lr_start: 1, lr_end: 1}]"
    (line,) = changed_keys(config(PHASE % "1e-4"), config(now))
    assert line.startswith("schedule.phases: [{'tokens': 100,")
