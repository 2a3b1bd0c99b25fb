"""Batch files: their form, the run that they start, and when they start it again. Slurm's commands are stand-ins."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.sft_checks import check_sft
from megatron_vl.rl.command import load as load_rl
from tests.slurm.local_slurm import LocalSlurm

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples").rglob("*.sbatch"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# Belongs to a person or a site: users give it on the command line or in SBATCH_* variables.
PERSONAL = (
    r"--(account|partition|qos|reservation|nodelist|exclude|mail-\w+|uid|gid|comment|constraint|wckey)\b",
    r"#SBATCH +-[ApqwxCU]\b",
    r"(?<![\w.$}\"])/(?!bin/bash|dev/null)[a-z]\w*/",  # absolute paths
    r"\b\d+\.\d+\.\d+\.\d+\b|\b[\w-]+\.(com|org|net|edu|local)\b",
    r"@\w+\.\w+",
)

STAND_INS = {
    "scontrol": """\
#!{python}
import json, os, sys
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    sys.stdout.write("".join(f"node{{n}}\\n" for n in range(1, int(os.environ["SLURM_NNODES"]) + 1)))
""",
    "srun": """\
#!{python}
import json, os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: os._exit(int(os.environ["AFTER_SIGNAL"])))
if os.environ.get("SAVES"):
    os.makedirs(os.environ["SAVES"] + "/checkpoints")
    time.sleep(0.05)  # a newer time stamp
    open(os.environ["SAVES"] + "/checkpoints/latest", "w").close()
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
if "AFTER_SIGNAL" in os.environ:
    time.sleep(30)
sys.exit(int(os.environ.get("CODE", 0)))
""",
}


def options(path: Path) -> dict[str, str]:
    """``#SBATCH --name=value`` lines."""
    found = re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", path.read_text(), flags=re.M)
    return dict(found)


def start(path: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """The batch file as Slurm starts it in ``folder``, with stand-ins for srun and scontrol."""
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "activate").write_text('export PATH="$PWD/.venv/bin:$PATH"\n')
    for name, text in STAND_INS.items():
        (tools / name).write_text(text.format(python=sys.executable))
        (tools / name).chmod(0o755)
    (folder / "examples").symlink_to(ROOT / "examples")
    environment = LocalSlurm.clean_environment() | variables
    environment |= {
        "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-9]", "SLURM_NNODES": options(path)["nodes"],
        "SLURM_CPUS_PER_TASK": options(path)["cpus-per-task"],
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(path), *arguments], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def calls(folder: Path, program: str) -> list[list[str]]:
    """Arguments of each call of a stand-in."""
    path = folder / "calls.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [words[1:] for words in found if Path(words[0]).name == program]


def requeues(folder: Path) -> list[list[str]]:
    return [call for call in calls(folder, "scontrol") if call[0] == "requeue"]


def test_the_promised_files_are_there():
    assert NAMES == [
        "examples/pretrain/16_nodes.sbatch",
        "examples/pretrain/1_node.sbatch",
        "examples/quickstart/quickstart.sbatch",
        "examples/rl/rlvr.sbatch",
        "examples/sft/8gpu.sbatch",
        "examples/sft/stage1.sbatch",
        "examples/sft/stage2.sbatch",
    ]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_form(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 120
    assert subprocess.run(["bash", "-n", path], check=False, capture_output=True).stderr == b""
    given = options(path)
    assert re.fullmatch(r"B:USR1@\d+", given["signal"]) and "requeue" in given
    assert given["open-mode"] == "append" and given["ntasks-per-node"] == "1"
    assert "srun" in text and "torchrun" in text
    named = re.findall(r"(?:examples|docs|tools)/[\w./]+\.\w+", text)
    assert named and [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_personal(path):
    assert [m.group() for rule in PERSONAL for m in re.finditer(rule, path.read_text())] == []


@pytest.mark.parametrize(
    "line",
    ["#SBATCH --account=x", "#SBATCH -p gpu", "cd /home/me/run", "source /opt/conda/bin/activate", "a=10.0.0.1",
     "#SBATCH --mail-user=me@site.org", "ssh login.site.edu"],
)  # fmt: skip
def test_the_rule_about_personal_things_can_fail(line):
    assert any(re.search(rule, line) for rule in PERSONAL)


def test_the_launch_is_the_same_in_all():
    """One text to understand: only sizes and the run differ."""
    tails = {re.sub(r"nproc-per-node=\d", "", path.read_text().split("master=")[1]) for path in FILES}
    assert len(tails) == 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_run_would_start(path, tmp_path, monkeypatch):
    """The command that srun gets: its options, and the run checked as it would be before the launch."""
    for name in ("train.jsonl", "heldout.jsonl", "sft_text.jsonl", "sft_multimodal.jsonl", "tokenizer.json",
                 "rlvr_prompts.jsonl"):  # fmt: skip
        (tmp_path / name).write_text("{}")
    (tmp_path / "Step3-VL-10B").mkdir()
    for name in ("sft_stage1", "sft_stage2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    data = tmp_path / "runs" / "quickstart" / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "heldout.jsonl", "tokenizer.model"):
        (data / name).write_text("{}")
    process = start(path, tmp_path, "train.log_interval=7")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "") and requeues(tmp_path) == []
    (words,) = calls(tmp_path, "srun")
    nodes = options(path)["nodes"]
    assert f"--nnodes={nodes}" in words and "--rdzv-endpoint=node1:20077" in words
    assert "--rdzv-id=77.0" in words and "--kill-on-bad-exit=1" in words
    per_node = next(int(word.split("=")[1]) for word in words if word.startswith("--nproc-per-node="))
    assert per_node == (int(options(path)["gpus-per-node"]) if "gpus-per-node" in options(path) else 2)
    start_of_run = words.index("-m")
    stage = path.parent.name if path.parent.name in ("sft", "rl") else "pretrain"
    assert words[start_of_run + 1 : start_of_run + 3] == ["megatron_vl", stage]
    config, *overrides = words[start_of_run + 3 :]
    monkeypatch.chdir(tmp_path)
    ranks = int(nodes) * per_node
    if stage == "rl":
        loaded = load_rl(config, overrides, ranks)
    else:
        checks = check_sft if stage == "sft" else None
        loaded = load_checked_run(config, overrides, None, ranks, True, checks)
    assert loaded.config.train.log_interval == 7
    assert (tmp_path / loaded.config.run_dir / "started").exists()


@pytest.mark.parametrize(
    ("variables", "again"),
    [({"CODE": "0", "SAVES": "runs/quickstart"}, False), ({"CODE": "1"}, False),
     ({"CODE": "1", "SAVES": "runs/quickstart"}, True)],
    ids=["finished", "failed without a new checkpoint", "failed after a new checkpoint"],
)  # fmt: skip
def test_when_it_is_started_again(tmp_path, variables, again):
    process = start(ROOT / "examples/quickstart/quickstart.sbatch", tmp_path, **variables)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == int(variables["CODE"]), output
    assert requeues(tmp_path) == ([["requeue", "77"]] if again else [])


@pytest.mark.parametrize(("code", "again"), [("1", True), ("0", False)])
def test_the_signal_goes_on_to_the_step(tmp_path, code, again):
    """srun ends only by the signal here; a run that finishes just then is not started again."""
    process = start(ROOT / "examples/quickstart/quickstart.sbatch", tmp_path, AFTER_SIGNAL=code)
    deadline = time.monotonic() + 30
    while not calls(tmp_path, "srun") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the stand-in may have written before the batch file knows its number
    os.kill(process.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == int(code) and "SIGUSR1 from Slurm" in output
    assert requeues(tmp_path) == ([["requeue", "77"]] if again else [])


def test_torchrun_ignores_the_signal_and_ranks_do_not_have_to():
    """What the batch files rely on: an ignored signal stays ignored over exec, until somebody installs a handler."""
    line = re.search(r"bash -c '(trap [^']*)exec torchrun", FILES[0].read_text()).group(1)
    rank = (
        "import os, signal; before = signal.getsignal(signal.SIGUSR1); signal.signal(signal.SIGUSR1, print);"
        "print(before == signal.SIG_IGN); os.kill(os.getpid(), signal.SIGUSR1)"
    )
    command = ["bash", "-c", f'{line} exec "$@"', "torchrun", sys.executable, "-c", rank]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("True\n10 ")
