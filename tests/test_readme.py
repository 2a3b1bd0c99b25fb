"""Every command of the README runs, or stands here with the reason why not."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Commands that are not run, by their beginning.
NOT_RUN = {
    "make quickstart": "10 minutes; its 20-step form is tests/test_quickstart_run.py",
    "make sft-quickstart": "8 minutes; its form of a few steps is tests/quickstart/test_sft_quickstart.py",
    "make rl-quickstart": "11 minutes; its form of a few steps is tests/quickstart/test_rl_quickstart.py",
    "make test": "this is it",
    "torchrun --nproc-per-node 8": "needs 8 GPUs",
    ".venv/bin/python tools/verify_release.py": "needs the released 20 GB; a small one is in test_verify_release.py",
    ".venv/bin/python -m megatron_vl pretrain examples/quickstart/quickstart.yaml": (
        "needs the quickstart's data; tests/train runs the same command on smaller data"
    ),
}


def commands() -> list[str]:
    """The lines of the README's ``sh`` blocks, comments taken off."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def reason(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def test_the_readme_starts_with_its_first_command():
    """What it is and the first command stand within 120 words."""
    before = (ROOT / "README.md").read_text().split("make quickstart")[0]
    assert len(before.split()) <= 120


def test_nothing_is_left_to_fill_in():
    assert re.findall(r"@[A-Z]+@", (ROOT / "README.md").read_text()) == []


def test_the_launch_on_gpus_would_start(tmp_path, monkeypatch):
    """All but the ranks: the line's files exist, and the run is checked as it would be before the launch."""
    from megatron_vl.plan.checks import load_checked_run

    words = shlex.split(next(c for c in commands() if c.startswith("torchrun")))
    config, *overrides = words[words.index("pretrain") + 1 :]
    for name in ("train.jsonl", "heldout.jsonl", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    load_checked_run(str(ROOT / config), overrides, None, 8, to_train=True)


def test_every_exemption_is_needed():
    assert [start for start in NOT_RUN if not any(c.startswith(start) for c in commands())] == []


def test_links_and_paths_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"(?:tools|examples|tests|megatron_vl)/[\w./]+\.(?:py|yaml|jpg|safetensors)", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("command", [c for c in commands() if reason(c) is None])
def test_command_runs(command: str, tmp_path: Path):
    words = shlex.split(command)
    assert words[0] == ".venv/bin/python", f"say in NOT_RUN why {command!r} is not run"
    words[0] = sys.executable
    if "--json" in words and words[-1].endswith(".json"):
        words[-1] = str(tmp_path / words[-1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip()
