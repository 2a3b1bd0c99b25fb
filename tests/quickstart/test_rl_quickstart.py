"""`make rl-quickstart` from its start to its table, with a few steps; and as users run it, with its promises."""

import json

import pytest

from tests.quickstart.test_sft_quickstart import QUICKSTART, ROOT, run

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "examples" / "rl" / "rl_quickstart.py"
EVIDENCE = ROOT / "examples" / "rl" / "rl_evidence.py"
SMALL = ("rl.iterations=2", "rl.eval_interval=2", "rl.rollout.prompts_per_iteration=16")


def test_a_few_iterations(tmp_path):
    first, out = tmp_path / "quickstart", tmp_path / "rl"
    small = ("--train-images", 60, "--heldout-questions", 60, "--no-checks")
    code, printed = run(QUICKSTART, f"run_dir={first}", *small, "train.train_steps=3")
    assert code == 0, printed
    arguments = ("--quickstart", first, "--out", out, "--pictures", 400, *SMALL)
    code, printed = run(SCRIPT, *arguments)
    assert code == 1 and "MISS" in printed, "nothing is learnt in two iterations"
    assert "iteration 2/2" in printed and "2 iterations, " in printed
    assert (out / "prepare" / "checkpoints" / "latest").read_text().strip() == "step_00000200"
    assert (out / "run" / "checkpoints" / "latest").read_text().strip() == "step_00000002"
    assert (out / "run" / "curve.png").stat().st_size > 1000
    again = (
        "--quickstart",
        first,
        "--out",
        tmp_path / "other",
        "--prepared",
        out / "prepare",
        "--pictures",
        400,
    )
    code, printed = run(SCRIPT, *again, "--control", "shuffled", "--no-checks", *SMALL)
    assert code == 0 and not (tmp_path / "other" / "prepare").exists(), printed
    tasks = [json.loads(line)["task"] for line in (tmp_path / "other" / "data" / "train.jsonl").open()]
    right = [json.loads(line)["task"] for line in (out / "data" / "train.jsonl").open()]
    assert tasks != right


def test_every_promise_holds(tmp_path):
    """With the quickstart before it, from nothing."""
    code, printed = run(SCRIPT, "--quickstart", tmp_path / "quickstart", "--out", tmp_path / "rl")
    assert code == 0, printed
    assert printed.count("\nok   ") == 5 + 4 and "holds no finished quickstart: it comes first" in printed
