"""The data of the RL quickstart: tasks follow from answers, nothing asked was shown, the control says nothing."""

import json
from collections import Counter
from pathlib import Path

import make_data
import make_prompts
import pytest
import rl_evidence
import rl_quickstart
import yaml

from megatron_vl.plan.checks import load_checked_run
from megatron_vl.rl.rewards.task import parse_task

HERE = Path(make_prompts.__file__).parent


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    small = ["--train-images", "20", "--heldout-questions", "100", "--workers", "1"]
    make_data.make_data(make_data.parse_arguments(["--out", str(folder), *small]))
    return folder


def made(quickstart: Path, out: Path, *options: object) -> Path:
    small = ["--prepare", 40, "--prompts", 80, "--per-type", 9, "--workers", 1, *options]
    words = ["--quickstart", quickstart, "--out", out, *small]
    make_prompts.make_prompts(make_prompts.parse_arguments([str(word) for word in words]))
    return out


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pictures(lines: list[dict]) -> set[str]:
    content = [line["messages"][0]["content"] for line in lines]
    return {part["image_url"]["url"] for parts in content for part in parts if part["type"] == "image_url"}


def test_what_is_written(quickstart, tmp_path):
    out = made(quickstart, tmp_path)
    prepare, train, heldout = (read(out / f"{name}.jsonl") for name in ("prepare", "train", "heldout"))
    assert len(prepare) == 40 and len(train) == 80
    assert not pictures(prepare) & pictures(train) and all(
        (out / name).is_file() for name in pictures(heldout)
    )
    assert Counter(line["source"] for line in train) == {"position": 40, "count": 20, "box": 20}
    for line in (*train, *heldout):
        assert parse_task(line["task"]) is not None and [m["role"] for m in line["messages"]] == ["user"]
    kinds = Counter(line["source"] for line in heldout)
    assert set(kinds) == {kind + suffix for kind in rl_quickstart.TYPES for suffix in make_prompts.HELDOUT}
    with_none = [line for line in heldout if line["source"].endswith(" no image")]
    assert with_none and not pictures(with_none)


def test_shuffled_answers_are_those_of_others_of_the_type(quickstart, tmp_path):
    right = read(made(quickstart, tmp_path / "right") / "train.jsonl")
    mixed = read(made(quickstart, tmp_path / "mixed", "--shuffled", 7) / "train.jsonl")
    assert [line["messages"] for line in right] == [line["messages"] for line in mixed], "the same questions"
    for kind in rl_quickstart.TYPES:
        one, other = (
            [str(line["task"]["answer"]) for line in lines if line["source"] == kind]
            for lines in (right, mixed)
        )
        assert Counter(one) == Counter(other) and one != other


def test_both_descriptions_load():
    for name in ("prepare.yaml", "rlvr_tiny.yaml"):
        assert load_checked_run(str(HERE / name), [], None, rl_quickstart.RANKS)
    assert yaml.safe_load((HERE / "prepare.yaml").read_text())["run_dir"] == "runs/rl_quickstart/prepare"


def responses(kind: str, rewards: list[float], outcome: str = "ok") -> list[dict]:
    return [{"source": kind, "reward": value, "outcome": outcome} for value in rewards]


def evaluated(value: float, blind: float = 0.1) -> list[dict]:
    found = []
    for kind in rl_quickstart.TYPES:
        found += responses(kind, [value, value]) + responses(kind, [0.0], "malformed")
        found += responses(f"{kind} swapped", [blind]) + responses(f"{kind} no image", [blind])
    return found


def test_promises_can_be_broken():
    before, after = evaluated(0.3), evaluated(0.9)
    assert all(held for held, _ in rl_quickstart.promises(before, after, [0.0, 0.1, 0.2]))
    too_little = rl_quickstart.promises(before, evaluated(0.45), [0.2, 0.1, 0.0])
    assert [held for held, _ in too_little] == [True, False, True, True, False]
    formed_only = rl_quickstart.promises(before, [r | {"outcome": "ok"} for r in evaluated(0.3)], [0, 0, 1])
    assert not formed_only[2][0], "an answer of the right form is not a right answer"
    looked_away = rl_quickstart.promises(before, after[:-1] + responses("box no image", [0.9]), [0, 0, 1])
    assert not looked_away[3][0]


def test_the_table_names_what_does_not_hold(tmp_path):
    row = dict.fromkeys(("explained early", "explained late", "minutes", "iterations"), 1.0)
    row |= {
        "before": 0.3,
        "after": 0.5,
        "formed before": 0.3,
        "formed after": 0.5,
        "swapped": 0.1,
        "blind": 0.1,
    }
    row |= {f"{kind} {when}": 0.4 for kind in rl_quickstart.TYPES for when in ("before", "after")}
    good = {"seed 1": row, "shuffled rewards": row | {"after": 0.25}}
    assert all(held for held, _ in rl_evidence.claims(good))
    bad = {"seed 1": row, "shuffled rewards": row}
    missed = [text for held, text in rl_evidence.claims(bad) if not held]
    assert len(missed) == 1 and missed[0].startswith("shuffled rewards: +0.200")
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{rl_evidence.BEGIN}\nFORMER\n{rl_evidence.END}\nafter\n")
    rl_evidence.write(document, "\n".join(rl_evidence.lines(bad, rl_evidence.claims(bad))))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "FORMER" not in text
    assert "Does not hold: shuffled rewards" in text
    document.write_text("nothing")
    with pytest.raises(SystemExit, match="rl-evidence: begin"):
        rl_evidence.write(document, "table")
