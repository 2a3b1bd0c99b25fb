"""Every command of examples/convert/README.md runs, one after the other, and its snippet is the key mapping."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vl.parity.release_logits import KEY_MAPPING
from tests.checkpoint.converting import all_tensors
from tests.fixtures.paths import TINY_A

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "examples" / "convert" / "README.md").read_text()


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder in which all of them ran, and what each printed."""
    pytest.importorskip("transformers", reason="the last command needs transformers")
    folder = tmp_path_factory.mktemp("walk")
    for name in ("tools", "examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = []
    for words in commands():
        assert words[0] == ".venv/bin/python"
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        printed.append(done.stdout)
    return folder, printed


def test_it_goes_all_the_way(walked):
    folder, printed = walked
    names = [next(word for word in words if word in WORDS) for words in commands()]
    assert names == [
        "import", "verify", "examples/quickstart/make_data.py", "pretrain", "inspect", "export", "verify",
        "examples/convert/generate_text.py",
    ]  # fmt: skip
    assert printed[1].rstrip().endswith("equal") and printed[6].rstrip().endswith("equal")
    assert "step 10/10" in printed[3]
    assert "saved from      TP2" in printed[4] and "step 10" in printed[4] and "exp_avg 98" in printed[4]
    assert "relative L2 0.0e+00" in printed[6]
    answer = json.loads(printed[7])
    assert 1 <= len(answer["ids"]) <= 16 and isinstance(answer["text"], str)


WORDS = {
    "import", "export", "verify", "inspect", "pretrain", "examples/quickstart/make_data.py",
    "examples/convert/generate_text.py",
}  # fmt: skip


def test_training_began_with_the_imported_weights_and_changed_them(walked):
    folder, _ = walked
    before, after = all_tensors(TINY_A), all_tensors(folder / "runs" / "convert" / "exported")
    assert before.keys() == after.keys()
    gaps = {name: (before[name] - after[name]).abs().max().item() for name in before}
    assert max(gaps.values()) > 1e-3  # 10 steps at about 1e-3
    assert max(gaps.values()) < 0.05  # other weights are 0.1 to 1 apart
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_the_snippet_is_the_key_mapping():
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    call = next(node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call))
    given = next(keyword.value for keyword in call.keywords if keyword.arg == "key_mapping")
    assert list(ast.literal_eval(given).items()) == list(KEY_MAPPING.items())


def test_what_it_names_exists():
    for name in re.findall(r"(?:tools|examples|docs|tests)/[\w./]+\.(?:py|yaml|md)", README):
        assert (ROOT / name).exists(), name
