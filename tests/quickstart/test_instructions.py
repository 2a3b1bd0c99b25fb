"""The data of the tiny SFT: forms follow from the question, nothing held out is trained on, some are too long."""

import json
from dataclasses import replace
from pathlib import Path

import instructions
import make_data
import pytest
import sft_quickstart
import yaml

from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.rows import RowBuilder
from megatron_vl.plan.checks import load_checked_run

STAGES = Path(sft_quickstart.__file__).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    quickstart, out = (tmp_path_factory.mktemp(name) for name in ("quickstart", "sft"))
    small = ["--train-images", "20", "--heldout-questions", "100", "--workers", "1"]
    make_data.make_data(make_data.parse_arguments(["--out", str(quickstart), *small]))
    options = ["--out", out, "--heldout", quickstart, "--images", 60, "--texts", 200, "--heldout-texts", 40]
    instructions.make_instructions(instructions.parse_arguments([str(o) for o in (*options, "--workers", 1)]))
    return quickstart, out


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else content[-1]["text"]


def test_the_form_of_an_answer_follows_from_the_question(folders):
    _, out = folders
    seen = dict.fromkeys(instructions.FORMS, 0)
    for name in ("text", "vision"):
        for line in read(out / name / "train.jsonl"):
            for user, answer in zip(line["messages"][::2], line["messages"][1::2]):
                asked, said = text_of(user["content"]), answer["content"]
                form = "sentence" if "in words" in asked else "brackets" if "in a box" in asked else "plain"
                assert said.endswith(".") == (form == "sentence") and said.startswith("[") == (
                    form == "brackets"
                )
                seen[form] += 1
    assert min(seen.values()) > 0.2 * sum(seen.values())


def test_held_out_questions(folders):
    quickstart, out = folders
    plain, formed = read(quickstart / "heldout.jsonl"), read(out / instructions.VISION)
    assert [line["id"] for line in plain] == [line["id"] for line in formed]
    for one, other in zip(plain, formed):
        assert one["messages"][0]["content"][0] == other["messages"][0]["content"][0], "the same picture"
        answer = other["messages"][1]["content"]
        assert one["answer"] in answer and answer == other["answer"] != one["answer"]
    described = {
        text_of(line["messages"][0]["content"]).split(".")[0] for line in read(out / "text" / "train.jsonl")
    }
    held = {text_of(line["messages"][0]["content"]).split(".")[0] for line in read(out / instructions.TEXT)}
    assert len(held) == 40 and not held & described


def test_every_conversation_is_usable_and_some_are_longer_than_a_row(folders):
    quickstart, out = folders
    stage = yaml.safe_load((STAGES / "stage1.yaml").read_text())
    data = DataConfig(
        data_root=str(out / "vision"), tokenizer=str(quickstart / "tokenizer.model"),
        seq_length=stage["data"]["seq_length"],
    )  # fmt: skip
    refused = {}
    for name in ("text", "vision"):
        source, builder = JsonlSource([str(out / name / "train.jsonl")]), RowBuilder(data, STEP3_VL_TINY)
        rows = [builder.build(source[n])[0] for n in range(len(source))]
        refused[name] = [row.refused.reason for row in rows if row.refused]
    assert refused == {"text": ["too_long"] * 2, "vision": []}
    held = replace(data, data_root=str(quickstart), seq_length=sft_quickstart.SCORED_LENGTH)
    for name in (instructions.TEXT, instructions.VISION):
        source, builder = JsonlSource([str(out / name)]), RowBuilder(held, STEP3_VL_TINY)
        assert [
            row.refused for row, _ in map(builder.build, map(source.__getitem__, range(len(source))))
        ] == [None] * len(source)


def test_a_held_out_picture_among_the_training_ones_is_found(folders, tmp_path, monkeypatch):
    quickstart, _ = folders
    named = [
        line["messages"][0]["content"][0]["image_url"]["url"] for line in read(quickstart / "heldout.jsonl")
    ]
    hashes = {"vision": {"a.png": "1"}, "held": {named[0]: "1"}}
    monkeypatch.setattr(
        instructions,
        "image_hashes",
        lambda folder, name: hashes["vision" if name == "train.jsonl" else "held"],
    )
    options = ["--out", tmp_path, "--heldout", quickstart, "--images", 10, "--texts", 10, "--workers", 1]
    with pytest.raises(SystemExit, match="1 held-out pictures are also training pictures"):
        instructions.make_instructions(instructions.parse_arguments([str(o) for o in options]))


def test_the_stages_are_what_the_example_says(folders, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["sft_quickstart.py", "--out", str(tmp_path), "train.train_steps=3"])
    arguments = sft_quickstart.parse()
    first, second = (
        load_checked_run(*sft_quickstart.split(sft_quickstart.stage(name, arguments)), None, 4).config
        for name in sft_quickstart.STAGES
    )
    assert [c.data.mixture[0].text_share for c in (first, second)] == [0.9, 0.5]
    assert first.train.init_from == "runs/quickstart" and second.train.init_from == first.run_dir
    assert first.parallel.context_parallel_size == 2 and first.train.train_steps == 3
    names = [
        load_checked_run(str(STAGES / f"{name}.yaml"), [], None, 4).config for name in sft_quickstart.STAGES
    ]
    assert names[1].train.init_from == names[0].run_dir
    moved = [[d.name, d.modality, d.weight] for d in first.data.domains]
    assert moved == [[d.name, d.modality, d.weight] for d in names[0].data.domains], "--out moves paths only"


def test_promises_can_be_broken():
    columns = sft_quickstart.COLUMNS

    def held(plain, formed, described, wait):
        names = ("pictures, plainly asked", "pictures, in a form", "descriptions, in a form")
        shares = {
            name: dict(zip(columns, values))
            for name, values in zip(names, (plain, formed, described), strict=True)
        }
        return [ok for ok, _ in sft_quickstart.promises(shares, {"stage1": 0.01, "stage2": wait})]

    good, none = (0.4, 0.3, 0.4), (0.0, 0.0, 0.0)
    assert held(good, (0, 0.1, 0.2), (0, 0.1, 0.2), 0.049) == [True] * 5
    assert held((0.4, 0.5, 0.39), none, none, 0.051) == [False, False, False, True, False]


def test_the_wait_leaves_out_the_first_step_only(tmp_path):
    lines = [{"step": n, "step_seconds": 2.0, "data_wait_seconds": 9.0 if n == 1 else 0.1} for n in (1, 2, 3)]
    lines.insert(1, {"step": 1, "eval_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sft_quickstart.waited(tmp_path) == pytest.approx(0.05)
