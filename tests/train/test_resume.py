"""A stopped run goes on as if it had not been stopped, or says why it cannot."""

from pathlib import Path

import pytest

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


def test_a_finished_run_does_nothing_more(world, stopped):
    (again,) = world.run(1, on_ranks.pretrain, load(stopped, "1", f"train.train_steps={STOPPED}"))
    assert again.progress.step == STOPPED and again.samples == []


def refused(world, config: Path, *overrides: str, layout: str = "1", act: str = "resume") -> list[str]:
    return world.run(LAYOUTS[layout][0], on_ranks.refused, load(config, layout, *overrides), act)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("data.seed=7", "seed 7 and 8 rows a step: the sample order would change silently"),
        ("train.global_batch_size=4", "seed 1234 and 4 rows a step: the sample order"),
        ("data.train=[{eval}]", "eval.jsonl (11 samples"),
    ],
)
def test_what_must_not_change_is_refused(world, data, stopped, change, expected):
    (error,) = refused(world, stopped, change.format(eval=data / "eval.jsonl"))
    assert error.startswith("CheckpointError: ") and expected in error and "use another run_dir" in error


@pytest.mark.parametrize(
    "change", ["model.text.num_layers=3", "model.text.ffn_hidden_size=128", "model.text.rotary_base=5e5"]
)
def test_another_model_is_refused_with_both_values(world, stopped, change):
    """Also where every shape is the same."""
    (error,) = refused(world, stopped, change)
    key, _, value = change.partition("=")
    assert error.startswith("ConfigErrors: ") and f"{key} = {float(value):g}".removesuffix(".0") in error
    assert "step_00000003/config.yaml says" in error and "use another run_dir" in error


def test_another_precision_goes_on_from_the_best_weights_there_are(world, data, tmp_path):
    """fp32 to bf16 rounds the weights and keeps them as main weights; back again nothing is lost."""
    config = write_config(data, tmp_path / "run")
    for steps, precision in ((2, "fp32"), (3, "bf16"), (5, "fp32")):
        keys = [f"train.train_steps={steps}", f"precision.params={precision}"]
        world.run(2, on_ranks.pretrain, load(config, "dp2", *keys))
    whole = write_config(data, tmp_path / "whole")
    world.run(2, on_ranks.pretrain, load(whole, "dp2", "train.train_steps=5"))
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert got[2] == pytest.approx(expected[2], abs=1e-6)
    assert got[4] == pytest.approx(expected[4], rel=2e-3) and got[5] == pytest.approx(expected[5], rel=2e-3)


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
