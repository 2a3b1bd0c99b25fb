"""The quickstart, short: the same script, fewer pictures, 20 steps."""

import json
import re
from pathlib import Path

import pytest

from tests.train.processes import Command
from tests.train.tiny_run import losses

SCRIPT = str(Path("examples/quickstart/quickstart.py"))
TYPES = ("colour", "shape", "count", "position", "box", "word")


def run(folder: Path, seconds: float, *arguments: str) -> Command:
    command = Command(folder, SCRIPT, f"run_dir={folder / 'run'}", *arguments)
    try:
        assert command.wait(seconds) == 0, command.output
    finally:
        command.close()
    return command


def test_twenty_steps(tmp_path):
    # The default --no-checks=off would fail, rightly: nothing is learnt in 20 steps.
    keys = [
        "train.train_steps=20",
        "schedule.warmup_tokens=20000",
        "train.log_interval=5",
        "data.num_workers=0",
    ]
    command = run(
        tmp_path, 600, "--train-images", "60", "--heldout-questions", "60", "--no-checks", *keys,
    )  # fmt: skip
    text, folder = command.stdout, tmp_path / "run"
    assert "no image is in both" in text
    assert re.findall(r"^step (\d+)/20 ", text, flags=re.M) == ["5", "10", "15", "20"]
    found = losses(folder)
    assert len(found) == 20 and found[20] < 0.6 * found[1] and found[1] == pytest.approx(6.24, abs=0.15)
    table = text[text.index("best constant") :]
    assert re.search(r"type +questions +best constant +before +after +swapped +no image", text)
    for kind in (*TYPES, "overall"):
        assert re.search(rf"^{kind} +\d+( +\d+\.\d %){{5}}$", table, flags=re.M), kind
    assert "overall 0.0 % before training" in table
    assert re.search(rf"20 steps, \d+\.\d minutes in all. In {folder}/: data/", table)
    scores = json.loads((folder / "scores.json").read_text())
    questions = (folder / "data" / "heldout.jsonl").read_text().splitlines()
    assert list(scores) == ["before", "after", "swapped", "no image"]
    assert all(set(right) == {json.loads(line)["id"] for line in questions} for right in scores.values())
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000020\n"


@pytest.mark.slow
def test_the_whole_quickstart_keeps_its_promises(tmp_path):
    """Twice the best constant answer for colour and overall, about 0 before, the fall with swapped images.

    The script itself exits with 1 when one of them fails. Ten minutes on 2 cores.
    """
    text = run(tmp_path, 3600).stdout
    assert len(re.findall(r"^ok  ", text, flags=re.M)) == 4 and "MISS" not in text
