"""A stopped run goes on as if it had not been stopped, or says why it cannot."""

import json
from pathlib import Path

import pytest
import torch

from tests.train import on_ranks
from tests.train.tiny_run import LAYOUTS, load, losses, make_files, read_lines, write_config

STOPPED, WHOLE = 3, 8
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def stopped(world, data, tmp_path_factory) -> Path:
    """The configuration of a run on one rank that has stopped after step 3."""
    config = write_config(data, tmp_path_factory.mktemp("stopped") / "run")
    world.run(1, on_ranks.pretrain, load(config, "1", f"train.train_steps={STOPPED}"))
    return config


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("1", []),
        ("dp2", ["precision.params=bf16"]),
        ("tp2pp2", []),
        pytest.param(
            "tp2pp2", ["parallel.use_distributed_optimizer=false", "optim.projector_lr_scale=0.5"], marks=SLOW
        ),
        pytest.param("dp2tp2", [], marks=SLOW),
    ],
    ids=["1", "dp2-bf16", "tp2pp2", "tp2pp2-plain", "dp2tp2"],
)
def test_a_resumed_run_has_the_losses_and_samples_of_an_uninterrupted_one(
    world, data, tmp_path, layout, keys
):
    ranks, _ = LAYOUTS[layout]
    for name, steps in (("whole", [WHOLE]), ("parts", [STOPPED, WHOLE])):
        config = write_config(data, tmp_path / name)
        seen = [
            world.run(ranks, on_ranks.pretrain, load(config, layout, f"train.train_steps={number}", *keys))
            for number in steps
        ]
        if name == "whole":
            whole = seen[0]
    first, second = seen
    assert [one.progress for one in second] == [one.progress for one in whole]
    for rank in range(ranks):
        assert first[rank].samples + second[rank].samples == whole[rank].samples
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert list(got) == list(expected) == list(range(1, WHOLE + 1))
    for step in range(STOPPED + 1, WHOLE + 1):
        assert got[step] == pytest.approx(expected[step], abs=1e-6), f"step {step}"
    assert expected[WHOLE] < expected[1] - 0.5, "nothing was learnt: the comparison would show nothing"
    assert f"resumed from {tmp_path / 'parts' / 'checkpoints' / 'step_00000003'}: step 3" in second[0].printed


def test_the_comparison_sees_a_lost_optimizer_state(world, data, stopped, tmp_path):
    """The losses of a run whose Adam moments were forgotten differ by far more than the tolerance."""
    results = []
    for forget in (False, True):
        config = write_config(data, tmp_path / f"run{forget}")
        world.run(1, on_ranks.pretrain, load(config, "1", f"train.train_steps={STOPPED}"))
        file = tmp_path / f"run{forget}" / "checkpoints" / "step_00000003" / "rank_00000.pt"
        if forget:
            saved = torch.load(file, weights_only=True)
            for moments in (s for o in saved["optimizers"] for s in o["state"]["state"].values()):
                moments["exp_avg"].zero_()
            torch.save(saved, file)
        world.run(1, on_ranks.pretrain, load(config, "1", "train.train_steps=5"))
        results.append(losses(tmp_path / f"run{forget}"))
    assert results[0][4] == results[1][4] and abs(results[0][5] - results[1][5]) > 1e-5


def test_a_finished_run_does_nothing_more(world, stopped):
    (again,) = world.run(1, on_ranks.pretrain, load(stopped, "1", f"train.train_steps={STOPPED}"))
    assert again.progress.step == STOPPED and again.samples == []


def refused(world, config: Path, *overrides: str, layout: str = "1", act: str = "resume") -> list[str]:
    return world.run(LAYOUTS[layout][0], on_ranks.refused, load(config, layout, *overrides), act)


def test_another_layout_is_refused_with_both_named(world, stopped):
    errors = refused(world, stopped, layout="tp2pp2")
    for error in errors:
        assert error.startswith("CheckpointError: ") and "resume in the same layout" in error
        assert (
            "was saved on TP1 CP1 DP1 PP1, vision" in error
            and "this run has TP2 CP1 DP1 PP2, vision" in error
        )
    (error,) = refused(world, stopped, "parallel.vision_placement=tensor")
    assert "placement data; this run has" in error and "placement tensor: resume" in error


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("data.seed=7", "seed 7 and 8 rows a step: the sample order would change silently"),
        ("train.global_batch_size=4", "seed 1234 and 4 rows a step: the sample order"),
        ("data.train=[{eval}]", "eval.jsonl (11 samples"),
        ("precision.params=bf16", "another model, precision or optimizer"),
        (
            "model.text.num_layers=3",
            "another model, precision or optimizer than this run has: weights differ",
        ),
        (
            "model.text.ffn_hidden_size=128",
            "another model, precision or optimizer than this run has: language_model",
        ),
    ],
)
def test_what_must_not_change_is_refused(world, data, stopped, change, expected):
    (error,) = refused(world, stopped, change.format(eval=data / "eval.jsonl"))
    assert error.startswith("CheckpointError: ") and expected in error and "use another run_dir" in error


def test_changed_data_files_are_refused(world, data, tmp_path):
    own = make_files(tmp_path)
    config = write_config(own, tmp_path / "run")
    world.run(1, on_ranks.pretrain, load(config, "1", "train.train_steps=1"))
    with (own / "train.jsonl").open("a") as file:
        file.write((own / "eval.jsonl").read_text().splitlines()[0] + "\n")
    (error,) = refused(world, config)
    assert (
        "was trained on" in error
        and "train.jsonl (24 samples" in error
        and "train.jsonl (25 samples" in error
    )


def test_damaged_and_unfinished_checkpoints(world, data, tmp_path):
    config = write_config(data, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    world.run(2, on_ranks.pretrain, load(config, "dp2", "train.train_steps=1"))
    (unfinished := folder / "step_00000002.tmp").mkdir()
    (unfinished / "rank_00000.pt").write_bytes(b"half")
    assert refused(world, config, layout="dp2") == ["", ""]
    file = folder / "step_00000001" / "rank_00001.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    first, second = refused(world, config, layout="dp2")
    assert first == "" and second.startswith(f"CheckpointError: {file} cannot be read: ")
    file.unlink()
    first, second = refused(world, config, layout="dp2")
    assert first == "" and f"{file} cannot be read: " in second and "No such file" in second
    meta = folder / "step_00000001" / "meta.json"
    meta.write_text(json.dumps({"progress": {}}))
    assert all(f"{meta} cannot be read" in error for error in refused(world, config, layout="dp2"))
    (folder / "latest").write_text("step_00000009")
    for error in refused(world, config, layout="dp2"):
        assert error.startswith("CheckpointError: ") and "'step_00000009', which is no checkpoint" in error


def test_a_rank_that_cannot_write_is_named_by_all_and_the_older_checkpoint_stays(world, data, tmp_path):
    config = write_config(data, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    world.run(2, on_ranks.pretrain, load(config, "dp2", "train.train_steps=1"))
    errors = refused(world, config, layout="dp2", act="full disk on 1")
    assert errors[0] == errors[1]
    assert errors[0].startswith("CheckpointError: rank 1 (dp1 pp0 cp0 tp0) could not write to ")
    assert "No space left on device" in errors[0]
    assert (folder / "latest").read_text() == "step_00000001" and not (folder / "step_00000002").exists()
    assert refused(world, config, layout="dp2") == ["", ""]
    # The folder cannot be made at all: a file is in its place. Only rank 0 tries, both end.
    blocked = write_config(data, tmp_path / "blocked")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "checkpoints").write_text("")
    for error in refused(world, blocked, layout="dp2", act="save"):
        assert error.startswith("CheckpointError: rank 0 (dp0 pp0 cp0 tp0) could not write to ")


def test_metrics_of_steps_that_are_repeated_are_cut_off(world, data, tmp_path):
    """A run killed after its last checkpoint has written steps that come again, and perhaps half a line."""
    config = write_config(data, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    world.run(1, on_ranks.pretrain, load(config, "1", "train.train_steps=2", "train.eval_interval=2"))
    with file.open("a") as lines:
        lines.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    world.run(1, on_ranks.pretrain, load(config, "1", "train.train_steps=4", "train.eval_interval=2"))
    records = read_lines(file)
    assert [(r["step"], "eval_loss" in r) for r in records] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True),
    ]  # fmt: skip
    assert records[3]["loss"] != 1.0 and records[-1]["eval_tokens"] > 0
