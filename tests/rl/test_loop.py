"""A whole run of reinforcement learning: draws, verifies, learns, saves, resumes, alike in every layout."""

import json

import pytest

from megatron_vl.errors import ConfigError, ConfigErrors
from megatron_vl.plan.checks import load_checked_run as load_to_train
from megatron_vl.rl import filtration
from megatron_vl.rl.command import load
from tests.rl.loop_on_ranks import keep_prompts, reinforce
from tests.rl.rewards.server import MODEL, Request, serving
from tests.rl.tiny_rl import KEYS, assert_same_curve, curve, prepare_files, trained_samples, write_rl_config
from tests.train import on_ranks
from tests.train.tiny_run import read_lines

LAYOUTS = {
    "1": (1, []),
    "tp2pp2": (4, ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]),
    "dp2cp2": (4, ["parallel.context_parallel_size=2"]),
}


@pytest.fixture(scope="module")
def data(world, tmp_path_factory):
    def pretrain(config):
        world.run(1, on_ranks.pretrain, load_to_train(str(config), KEYS, None, 1, to_train=True))

    return prepare_files(tmp_path_factory.mktemp("rl"), pretrain)


def run(world, config, layout="1", *overrides, spoil=""):
    ranks, keys = LAYOUTS[layout]
    return world.run(ranks, reinforce, load(str(config), [*keys, *overrides], ranks), spoil)


@pytest.fixture(scope="module")
def whole(world, data):
    """The folder of a run on one rank, and what it saw."""
    config = write_rl_config(data, data / "whole", eval_interval=3)
    return data / "whole", run(world, config)[0]


def test_a_run_leaves_what_it_promises(whole):
    folder, seen = whole
    assert seen.error == "" and seen.progress.step == 3 and seen.progress.samples == 48
    metrics = [r for r in read_lines(folder / "metrics.jsonl") if "reward/mean" in r]
    assert [r["step"] for r in metrics] == [1, 2, 3]
    assert 0 < metrics[0]["reward/mean"] < 1, "rewards that do not differ teach nothing"
    for name in (
        "reward/source/count", "prompts/some_accept", "length/truncated_rate", "policy/approx_kl_k3",
        "policy/clip_fraction", "policy/entropy", "policy/mismatch_max", "critic/explained_variance", "seconds/learn",
        "tokens_per_second_per_gpu", "features/computed",
    ):  # fmt: skip
        assert all(name in r for r in metrics), name
    assert metrics[0]["policy/mismatch_max"] < 1e-5
    assert [r["step"] for r in read_lines(folder / "metrics.jsonl") if "eval/reward/mean" in r] == [0, 3]
    assert [len(part) for part in trained_samples(folder)] == [16, 16, 16]
    assert "reward" in (folder / "rollouts" / "iteration_000001.html").read_text()
    assert sorted(p.name for p in (folder / "journal").iterdir()) == ["iteration_000001", "iteration_000002"]
    assert "iteration 3/3 | reward" in seen.printed and "eval at iteration 3" in seen.printed


def test_frozen_means_frozen_and_features_are_computed_once(whole):
    folder, seen = whole
    assert seen.vision[0] == seen.vision[1] and not seen.vision_is_optimized
    prompts = [r for split in ("train", "eval") for r in read_lines(folder.parent / f"{split}_prompts.jsonl")]
    parts = {r["id"]: r["messages"][0]["content"][0] for r in prompts}
    image_of = {name: part["image"] for name, part in parts.items() if part["type"] == "image"}
    asked = {sample[0] for part in trained_samples(folder) for sample in part} | {
        f"eval{n}" for n in range(6)
    }
    last = read_lines(folder / "metrics.jsonl")[-2]
    assert last["features/computed"] == len({image_of[name] for name in asked if name in image_of}) >= 6


@pytest.mark.parametrize("layout", ["tp2pp2", "dp2cp2"])
def test_layouts_draw_and_learn_alike(world, data, whole, tmp_path, layout):
    config = write_rl_config(data, tmp_path / "run", iterations=2)
    seen = run(world, config, layout)
    assert [one.error for one in seen] == [""] * 4 and len({one.progress for one in seen}) == 1
    expected, got = curve(whole[0]), curve(tmp_path / "run")
    for iteration in (1, 2):
        assert got[iteration] == pytest.approx(expected[iteration], rel=1e-3, abs=1e-6)
    texts = [[sample[:3] + sample[4:] for sample in part] for part in trained_samples(tmp_path / "run")]
    assert texts == [[s[:3] + s[4:] for s in part] for part in trained_samples(whole[0])][:2]


def test_stopped_while_drawing_and_resumed(world, data, whole, tmp_path):
    """What was drawn before the stop is not drawn again, and the curve is that of the run that was left alone."""
    config = write_rl_config(data, tmp_path / "run")
    first = run(world, config, "1", "rl.iterations=1")[0]
    stopped = run(world, config, spoil="stop")[0]
    assert stopped.progress.step == 1 and "stopped on SIGTERM after iteration 1" in stopped.printed
    resumed = run(world, config)[0]
    assert first.progress.step == 1 and resumed.progress.step == 3 and "resumed from" in resumed.printed
    records = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "reward/mean" in r]
    assert [r["journal/resumed"] for r in records] == [0, 8, 0]
    assert_same_curve(tmp_path / "run", whole[0])
    assert trained_samples(tmp_path / "run") == trained_samples(whole[0])


def test_a_verifier_that_fails_stops_the_run_before_anything_is_learnt(world, data, tmp_path):
    config = write_rl_config(data, tmp_path / "run")
    (seen,) = run(world, config, spoil="verifier")
    assert "16 of 16 verdicts" in seen.error or "verdicts of this iteration are missing" in seen.error
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not curve(tmp_path / "run")


def test_other_prompts_are_refused_when_a_run_goes_on(world, data, tmp_path):
    config = write_rl_config(data, tmp_path / "run", iterations=1)
    run(world, config)
    (seen,) = run(world, config, "1", "data.seed=9")
    assert seen.error.startswith("CheckpointError") and "other prompts would come" in seen.error


def test_strict_on_policy(world, data, tmp_path):
    config = write_rl_config(
        data, tmp_path / "run", iterations=2,
        ppo={"strict_on_policy": True, "mini_batches": 1, "ratio_mode": "detached"},
    )  # fmt: skip
    (seen,) = run(world, config)
    assert seen.error == ""
    for r in read_lines(tmp_path / "run" / "metrics.jsonl"):
        ratios = [r[f"policy/{n}"] for n in ("ratio_min", "ratio_max", "clip_fraction")]
        assert ratios == [1.0, 1.0, 0.0] and r["samples/stale"] == 0


def check_by_count(request: Request) -> None:
    """A judge that only finds numbers checkable."""
    number = request.asked["reference"] in ("three", "five")
    request.says(f"Looked at.\nVERDICT: {'CHECKABLE' if number else 'NOT_CHECKABLE'}")


def test_prompts_are_filtered(world, data, tmp_path):
    """In two layouts, one of them stopped on the way; every number of the report follows from the responses."""
    words = ["unread.yaml", "--out", str(tmp_path), "--samples", "4", "--needs-image", "0.5", "--checkable"]
    config = write_rl_config(data, tmp_path / "one")

    def keep(folder, layout, spoil=""):
        ranks, keys = LAYOUTS[layout]
        keys = [*keys, f"run_dir={folder}", f"rl.rewards.judge={{base_url: {server.url}, model: {MODEL}}}"]
        return world.run(ranks, keep_prompts, load(str(config), keys, ranks), words, spoil)[0]

    with serving(check_by_count) as server:
        assert "stopped after 0 of 6 groups" in keep(tmp_path / "one", "1", "stop").printed
        done = keep(tmp_path / "one", "1")
        assert done.error == "" and "filter: 24 of 24 prompts" in done.printed
        assert keep(tmp_path / "two", "tp2pp2").error == ""
    asked = {body["messages"][-1]["content"] for body in server.requests}
    assert len(asked) >= 2, "one request per question and reference"
    records = [
        r for g in range(6) for r in read_lines(tmp_path / "one" / "prompts" / f"iteration_{g:06d}.jsonl")
    ]
    for name in ("report.json", "kept.jsonl"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["prompts"] == len(records) == 24 and sum(report["classes"].values()) == 24
    kinds = {r["id"]: any(part["type"] == "image" for part in r["messages"][0]["content"]) for r in records}
    for record in records:
        rules, number = record["rules"], record["source"] == "count"
        assert ("checkable" in rules) == number and ("not_checkable" in rules) != number
        assert ("no_image" in rules) != kinds[record["id"]]
        some = record["acceptance"]["class"] in ("some_accept", "some_reject")
        allowed = number and "image_not_needed" not in rules and "no_verdict" not in rules
        assert record["kept"] == (some and allowed), record
    assert report["rules"]["checkable"] == sum(r["source"] == "count" for r in records)
    assert {line["id"] for line in read_lines(tmp_path / "one" / "kept.jsonl")} == {
        record["id"] for record in records if record["kept"]
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["--checkable"], "rl.rewards.judge.base_url is empty"),
        (["--needs-image", "0"], "--needs-image 0"),
        (["--samples", "1"], "--samples 1"),
        (["--min-rate", "0.5", "--max-rate", "0.5"], "--min-rate 0.5"),
    ],
)
def test_filters_that_cannot_be_applied(words, message):
    with pytest.raises(ConfigError, match=message):
        filtration.check(filtration.parse(["a.yaml", "--out", "b", *words]), "")


def test_what_a_run_needs_is_said_at_once(data):
    config = write_rl_config(data, data / "none")
    with pytest.raises(ConfigErrors) as error:
        load(str(config), ["rl.prompts=[]", "train.init_from=none", "model.freeze_vision=false", "rl.eval_interval=2",
                           "rl.eval_prompts=[]"], 1)  # fmt: skip
    for key in ("rl.prompts", "train.init_from", "model.freeze_vision", "rl.eval_prompts"):
        assert f"  {key} = " in str(error.value)
