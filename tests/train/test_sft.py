"""`python -m megatron_vl sft`: what it asks before anything starts, and two stages, the second from the first."""

import json
from pathlib import Path

import pytest
import torch

from megatron_vl.__main__ import main
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.parallel import launch
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.sft_checks import check_sft
from megatron_vl.train import pretrain
from tests.data.tiny import chat, write_jsonl
from tests.train import on_ranks
from tests.train.tiny_run import LAYOUTS, SEQ_LENGTH, load, make_files, read_lines, write_config

ROW = 2 * SEQ_LENGTH
PACKED = "data.packing={enabled: true, pad_multiple: 8, look_ahead_rows: 8, index_workers: 0, overlong: split_turns}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The tiny run's files; text.jsonl holds conversations without pictures, one of them longer than a row."""
    folder = make_files(tmp_path_factory.mktemp("sft"))
    lines = [chat(f"How many? {n}", "three", id=f"t{n}") for n in range(20)]
    lines[4]["messages"] *= 20
    write_jsonl(folder / "text.jsonl", lines)
    return folder


def keys(data: Path, text_share: float) -> list[str]:
    files = {"text": data / "text.jsonl", "vision": data / "train.jsonl"}
    domains = [
        f"{{name: {name}, paths: [{path}], modality: {'text' if name == 'text' else 'multimodal'}, weight: 1}}"
        for name, path in files.items()
    ]
    mixture = f"data.mixture=[{{text_share: {text_share}}}]"
    return [
        "data.train=[]",
        f"data.domains=[{', '.join(domains)}]",
        mixture,
        PACKED,
        f"data.seq_length={ROW}",
    ]


@pytest.fixture
def nothing_starts(monkeypatch):
    def started(*args):
        raise AssertionError("the run was started")

    monkeypatch.setattr(pretrain, "run_local", started)
    monkeypatch.setattr(pretrain, "train_on_rank", started)
    monkeypatch.setattr(launch.subprocess, "Popen", started)
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def said(capsys, *arguments: str) -> str:
    assert main(["sft", *arguments]) == 2
    return capsys.readouterr().err


def test_what_is_refused_before_anything_starts(nothing_starts, data, tmp_path, capsys):
    config = str(write_config(data, tmp_path / "run"))
    text = said(capsys, config, "data.loss_on=all_text", "train.global_batch_size=7", "--nproc", "2")
    assert "train.init_from = none: fine-tuning starts from weights, and" in text
    assert "data.loss_on = all_text: fine-tuning learns answers" in text
    assert "3 problems" in text and "train.global_batch_size = 7" in text
    assert "train.init_from = /none: no such folder" in said(capsys, config, "train.init_from=/none")
    with pytest.raises(AssertionError, match="started"):
        main(["sft", config, f"train.init_from_hf={tmp_path}"])
    with pytest.raises(AssertionError, match="started"):
        main(["pretrain", config])


def finished(folder: Path, config: Path, steps: int, done: int) -> Path:
    """A run folder as far as its names go."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text(f"step_{done:08d}\n")
    (folder / "config.yaml").write_text(config.read_text().replace("train_steps: 8", f"train_steps: {steps}"))
    return folder


def test_the_run_before_must_be_finished(nothing_starts, data, tmp_path, capsys):
    config = write_config(data, tmp_path / "run")
    early = finished(tmp_path / "early", config, 50, 30)
    text = said(capsys, str(config), f"train.init_from={early}")
    assert "this run has done 30 of its 50 steps; finish it, or name the checkpoint that is meant:" in text
    assert f"{early}/checkpoints/step_00000030" in text
    named = early / "checkpoints" / "step_00000030"
    named.mkdir()
    for first in (finished(tmp_path / "all", config, 50, 50), named):
        with pytest.raises(AssertionError, match="started"):
            main(["sft", str(config), f"train.init_from={first}"])
    # A run that goes on from its own checkpoint asks for nothing.
    finished(tmp_path / "run", config, 50, 30)
    with pytest.raises(AssertionError, match="started"):
        main(["sft", str(config)])


def test_splitting_needs_packed_rows_and_loss_on_every_answer(data, tmp_path, capsys):
    config = str(write_config(data, tmp_path / "run", micro_batch_size=1))
    text = said(capsys, config, PACKED, "data.loss_on=assistant_last")
    assert (
        "data.packing.overlong = split_turns: with data.loss_on = assistant_last only the last piece" in text
    )
    text = said(capsys, config, "data.packing.overlong=split_turns")
    assert "only packed rows hold pieces of a conversation, but data.packing.enabled = false" in text


def test_two_stages(world, data, tmp_path):
    """Stage 2 takes the weights of stage 1 in another layout, and begins steps, schedule, optimizer and plan anew."""
    pre = write_config(data, tmp_path / "pre", train_steps=1)
    world.run(1, on_ranks.pretrain, load(pre))
    printed, runs = [], [tmp_path / name for name in ("pre", "stage1", "stage2")]
    for number, (layout, share, steps) in enumerate((("cp2", 0.9, 2), ("dp2", 0.5, 1))):
        config = write_config(data, runs[number + 1], micro_batch_size=1, train_steps=steps)
        ranks, layout_keys = LAYOUTS[layout]
        overrides = [*layout_keys, *keys(data, share), f"train.init_from={runs[number]}"]
        loaded = load_checked_run(str(config), overrides, None, ranks, True, check_sft)
        printed.append(world.run(ranks, on_ranks.pretrain, loaded)[0].printed)
    assert all("cut at turns in domain text: 1 of 20 samples, into " in text for text in printed)
    rates = [[record["lr"] for record in read_lines(run / "metrics.jsonl")] for run in runs[1:]]
    assert rates[1] == [0.0] and rates[0][0] == 0.0 and rates[0][1] > 0
    plans = [json.loads((run / "data_plan.json").read_text()) for run in runs[1:]]
    assert [plan["phases"][0]["text_share"] for plan in plans] == pytest.approx([0.9, 0.5], abs=0.1)
    first, second = (Stored(run / "checkpoints" / f"step_{n:08d}") for run, n in ((runs[1], 2), (runs[2], 1)))
    assert (
        set(second.state["optimizer_steps"].values()) == {1} and second.state["progress"]["tokens"] == 8 * ROW
    )
    # A step at learning rate 0 leaves the weights as they came.
    names = [f"model/{name}" for name in first.weight_names]
    assert all(torch.equal(first.read(name), second.read(name)) for name in names)
    before = Stored(runs[0] / "checkpoints" / "step_00000001")
    assert not all(torch.equal(first.read(name), before.read(name)) for name in names)
