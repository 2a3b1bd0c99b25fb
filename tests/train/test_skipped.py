"""A loss or gradient that is not finite: the step is left out on all ranks alike, counted, and written down."""

import json
from pathlib import Path

import pytest

from tests.train import on_ranks, skipping_on_ranks
from tests.train.tiny_run import LAYOUTS, TOKENS_PER_STEP, load, losses, make_files, read_lines, write_config

PLAIN_OPTIMIZER = "parallel.use_distributed_optimizer=false"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("skipped"))


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("tp2pp2", []),
        ("dp2tp2", []),
        ("dp2tp2", [PLAIN_OPTIMIZER]),
        ("1", ["precision.params=bf16"]),
        ("1", ["optim.clip_grad=0"]),
    ],
    ids=["tp2pp2", "dp2tp2", "dp2tp2_plain", "bf16", "unclipped"],
)
def test_a_good_step_is_megatrons_step_bit_by_bit(world, data, tmp_path, layout, keys):
    loaded = load(write_config(data, tmp_path / "run"), layout, *keys)
    ours, theirs = (
        world.run(LAYOUTS[layout][0], skipping_on_ranks.trained, loaded, 3, plain) for plain in (False, True)
    )
    for (norms, state), (expected_norms, expected) in zip(ours, theirs, strict=True):
        assert norms == expected_norms and all(norm > 1 for norm in norms), "nothing was clipped"
        assert skipping_on_ranks.unequal(state, expected) == [] and len(state) > 50


@pytest.mark.parametrize(
    ("layout", "keys", "how", "rank"),
    [
        ("tp2pp2", [], "gradient", 1),
        # the tower, of which the norm takes the copy of TP rank 0
        ("dp2tp2", [], "gradient", 3),
        # a norm over one replica: the other one's is finite
        ("dp2tp2", [PLAIN_OPTIMIZER], "gradient", 2),
        ("dp2tp2", [], "loss", 2),
    ],
    ids=["tp2pp2", "dp2tp2", "dp2tp2_plain", "loss"],
)
def test_a_bad_step_changes_nothing_on_any_rank(world, data, tmp_path, layout, keys, how, rank):
    config = write_config(data, tmp_path / "run")
    loaded = load(config, layout, *keys, "train.train_steps=4", "checkpoint.save_interval=2")
    ranks = world.run(LAYOUTS[layout][0], skipping_on_ranks.poisoned, loaded, (2,), how, rank)
    assert [r.changed for r in ranks] == [{2: []}] * len(ranks)
    assert {r.skipped for r in ranks} == {1} and {r.error for r in ranks} == {""}
    run = tmp_path / "run"
    lines = read_lines(run / "metrics.jsonl")
    assert [r["step"] for r in lines] == [1, 2, 3, 4] and [r["skipped_steps"] for r in lines] == [0, 1, 1, 1]
    assert [r["tokens"] for r in lines] == [TOKENS_PER_STEP * n for n in (1, 2, 3, 4)], (
        "the data are consumed"
    )
    bad = lines[1]
    assert (bad["loss"] is None, bad["grad_norm"] is None) == (
        (False, True) if how == "gradient" else (True, False)
    )
    (record,) = read_lines(run / "skipped_steps.jsonl")
    assert set(record) == {"step", "tokens", "loss", "grad_norm", "samples"}
    assert record["step"] == 2 and record["tokens"] == 2 * TOKENS_PER_STEP
    assert (record["grad_norm"] in ("inf", "nan")) == (how == "gradient")
    assert (record["loss"] == "nan") == (how == "loss")
    everyones = {name for r in ranks for name in r.samples[2]}
    assert len(record["samples"]) == 8 and set(record["samples"]) == everyones, (
        "samples of the whole global batch"
    )
    assert (
        "step 2 skipped: loss " in ranks[0].printed
        and "1 in a row (at most 10), 1 in all" in ranks[0].printed
    )
    # Step 2 was due to be saved; the weights are saved when a good step has shown that they are good.
    assert {p.name for p in (run / "checkpoints").glob("step_*")} == {"step_00000003", "step_00000004"}


def strict(text: str) -> dict:
    """JSON without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_too_many_in_a_row_end_the_run_and_the_good_checkpoint_stays(world, data, tmp_path):
    config, run = write_config(data, tmp_path / "run"), tmp_path / "run"
    keys = ["train.train_steps=6", "checkpoint.save_interval=1", "train.max_skipped_steps=2"]
    ranks = world.run(2, skipping_on_ranks.poisoned, load(config, "dp2", *keys), (3, 4, 5, 6), "gradient", 1)
    assert [r.changed for r in ranks] == [{3: [], 4: [], 5: []}] * 2
    for r in ranks:
        assert r.error.startswith(
            "TooManySkippedSteps: 3 steps in a row had a loss or gradient that is not finite"
        )
        assert f"the newest checkpoint is that of step 2 in {run}/checkpoints" in r.error
        for step in (3, 4, 5):
            samples = ranks[0].samples[step] + ranks[1].samples[step]
            assert f"step {step}: {', '.join(samples)}" in r.error
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000002"
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_00000001", "step_00000002"]
    assert [strict(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert [r["step"] for r in read_lines(run / "skipped_steps.jsonl")] == [3, 4, 5]
    # Without the fault the run goes on as if there had been none; the steps that come again are written anew.
    world.run(2, skipping_on_ranks.poisoned, load(config, "dp2", *keys), (5,), "loss", 0)
    assert [r["step"] for r in read_lines(run / "skipped_steps.jsonl")] == [3, 4, 5]
    found = read_lines(run / "metrics.jsonl")
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6] and [r["skipped_steps"] for r in found] == [
        0,
        0,
        0,
        0,
        1,
        1,
    ]
    straight = write_config(data, tmp_path / "straight")
    world.run(2, on_ranks.pretrain, load(straight, "dp2", *keys))
    expected = losses(tmp_path / "straight")
    assert {s: losses(run)[s] for s in (3, 4)} == pytest.approx({s: expected[s] for s in (3, 4)}, rel=1e-6)


def test_a_last_step_that_is_bad_is_saved_all_the_same(world, data, tmp_path):
    """The run has ended: nothing better will come."""
    config = write_config(data, tmp_path / "run")
    loaded = load(config, "1", "train.train_steps=2", "train.max_skipped_steps=1")
    (rank,) = world.run(1, skipping_on_ranks.poisoned, loaded, (2,), "gradient", 0)
    assert rank.error == "" and rank.skipped == 1
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_00000002"


def test_no_skipped_step_at_all_may_be_allowed(world, data, tmp_path):
    config = write_config(data, tmp_path / "run")
    (rank,) = world.run(
        1, skipping_on_ranks.poisoned, load(config, "1", "train.max_skipped_steps=0"), (1,), "loss", 0
    )
    assert "1 steps in a row" in rank.error and "there is no checkpoint yet" in rank.error
