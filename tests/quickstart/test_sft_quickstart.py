"""`make sft-quickstart` from its start to its table, with a few steps; and as users run it, with its promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart" / "quickstart.py"
SCRIPT = ROOT / "examples" / "sft" / "quickstart" / "sft_quickstart.py"


def run(script: Path, *arguments: object) -> tuple[int, str]:
    """Exit code, and what was printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_few_steps(tmp_path):
    first, out = tmp_path / "quickstart", tmp_path / "sft"
    small = ("--train-images", 60, "--heldout-questions", 60, "--no-checks")
    code, printed = run(QUICKSTART, f"run_dir={first}", *small, "train.train_steps=3")
    assert code == 0, printed
    arguments = ("--quickstart", first, "--out", out, "--images", 60, "train.train_steps=3")
    code, printed = run(SCRIPT, *arguments)
    assert code == 1 and "MISS" in printed, "nothing is learnt in three steps"
    assert "resumed from" not in printed and printed.count("cut at turns in domain text: ") == 2
    assert "Layout of 4 ranks: TP1 CP2 DP2 PP1" in printed
    for n in (1, 2):
        assert (out / f"stage{n}" / "checkpoints" / "latest").read_text().strip() == "step_00000003"
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores) == ["pre-trained", "stage 1", "stage 2"]
    assert all(
        [len(right) for right in files.values()][1:] == [len(files["pictures, plainly asked"]), 300]
        for files in scores.values()
    )
    code, printed = run(SCRIPT, *arguments, "--no-checks")
    assert code == 0 and printed.count("resumed from") == 2, "a second call only scores"
    assert json.loads((out / "scores.json").read_text()) == scores


def test_every_promise_holds(tmp_path):
    """With the quickstart before it, from nothing."""
    code, printed = run(SCRIPT, "--quickstart", tmp_path / "quickstart", "--out", tmp_path / "sft")
    assert code == 0, printed
    assert printed.count("\nok   ") == 5 + 4 and "holds no finished quickstart: it comes first" in printed
