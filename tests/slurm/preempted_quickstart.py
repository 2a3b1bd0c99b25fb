"""The quickstart's batch file on a Slurm of two nodes: signal before the time limit, save, requeue, resume, finish.

    python -m tests.slurm.preempted_quickstart [FOLDER]

Without FOLDER a new one is made in the temporary directory; it keeps everything when a check fails. Two to four
minutes on 2 cores. Only the length of the run, its batch size and the time limit differ from what users submit.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm.local_slurm import LocalSlurm

ROOT = Path(__file__).parents[2]
BATCH_FILE = "examples/quickstart/quickstart.sbatch"
CONFIG = "examples/quickstart/quickstart.yaml"

# Slurm looks at time limits every 30 s and sends the signal up to 30 s early: 40 to 70 s after the start.
OPTIONS = ("--time=2", "--signal=B:USR1@50")
# exit_duration_minutes: the ranks' own end, should this script be killed and leave them behind.
OVERRIDES = (
    "train.micro_batch_size=8", "train.global_batch_size=16", "train.log_interval=5", "train.exit_duration_minutes=8"
)  # fmt: skip
STEPS_AFTER = 15
ENDED = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")
WAIT_SECONDS = 200.0

# What the job's log must show, in this order.
MILESTONES = {
    "steps before": r"^step \d+/",
    "signal from Slurm": r"SIGUSR1 from Slurm",
    "save": r"^saved \S*step_0*(?P<saved>\d+)",
    "requeue": r"exit code \d+: requeue",
    "resume": r"^resumed from \S*step_0*(?P<resumed>\d+)",
    "steps after": r"^step \d+/",
    "end": r"^done: (?P<done>\d+) steps",
}


class Failed(Exception):
    """What was expected of the job and did not happen."""


def prepare(folder: Path) -> None:
    """A checkout as a user has it: examples, package, environment, the quickstart's data (a small one)."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "megatron_vl").symlink_to(ROOT / "megatron_vl")
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    data = ["--out", "runs/quickstart/data", "--train-images", "60", "--heldout-questions", "60"]
    make_data = [sys.executable, "examples/quickstart/make_data.py", *data]
    environment = LocalSlurm.clean_environment() | {"PYTHONPATH": str(folder)}
    subprocess.run(make_data, cwd=folder, check=True, timeout=180, stdout=subprocess.DEVNULL, env=environment)


def set_steps(folder: Path, steps: int) -> None:
    """The length of the run, read again at every start of the job."""
    path = folder / CONFIG
    text, found = re.subn(r"^  train_steps: \d+$", f"  train_steps: {steps}", path.read_text(), flags=re.M)
    if found != 1:
        raise Failed(f"{path} has {found} lines with train_steps, one is expected")
    path.write_text(text)


def steps_done(folder: Path) -> list[int]:
    """Steps in metrics.jsonl, in its order."""
    path = folder / "runs" / "quickstart" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]


def await_job(slurm: LocalSlurm, job: str, what: str, reached: Callable[[dict[str, str]], bool]) -> None:
    """Look at the job until ``reached`` says yes.

    Raises:
        Failed: the job ended in another way, or WAIT_SECONDS have passed.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        state = slurm.job(job)
        if reached(state):
            print(f"{time.strftime('%T')} {what}", flush=True)
            return
        if state["JobState"] in ENDED:
            raise Failed(f"job {state['JobState']} ({state['ExitCode']}) while waiting for: {what}")
        if time.monotonic() > deadline:
            raise Failed(f"job {state['JobState']}, after {WAIT_SECONDS:.0f} s still waiting for: {what}")
        time.sleep(0.5)


def check_log(text: str) -> dict[str, int]:
    """The numbers in the milestones' lines.

    Raises:
        Failed: one is missing or comes too early.
    """
    numbers: dict[str, int] = {}
    position = 0
    for name, pattern in MILESTONES.items():
        match = re.compile(pattern, flags=re.M).search(text, position)
        if match is None:
            raise Failed(f"the job's log does not show {name!r} ({pattern}) after the milestones before it")
        position = match.end()
        numbers |= {key: int(value) for key, value in match.groupdict().items()}
        line = text[text.rfind("\n", 0, match.start()) + 1 :].split("\n", 1)[0]
        print(f"  {name}: {line[:100]}", flush=True)
    return numbers


def scenario(slurm: LocalSlurm, folder: Path) -> None:
    """Submit, wait for the requeue, shorten the run, wait for the end, check."""
    set_steps(folder, 1_000_000)
    command = ["sbatch", "--parsable", f"--chdir={folder}", *OPTIONS, BATCH_FILE, *OVERRIDES]
    job = slurm.run(*command, folder=folder).strip()
    log = folder / f"quickstart-{job}.log"
    await_job(slurm, job, "started", lambda state: state["JobState"] == "RUNNING")
    await_job(slurm, job, "requeued", lambda state: state["Restarts"] != "0")
    before = steps_done(folder)
    if not before:
        raise Failed("no step was done before the signal")
    total = before[-1] + STEPS_AFTER
    set_steps(folder, total)
    await_job(slurm, job, "finished", lambda state: state["JobState"] == "COMPLETED")
    sent = re.search(rf"\w+: warning signal 10 to JobId={job}\b", slurm.log("slurmctld"))
    if sent is None:
        raise Failed("slurmctld's log does not say that it sent SIGUSR1")
    print(f"  slurmctld: {sent.group()}")
    text = log.read_text()
    if "User defined signal" in text:
        raise Failed("a torchrun was ended by the signal: a save that takes long would be cut off")
    numbers = check_log(text)
    expected = {"saved": before[-1], "resumed": before[-1], "done": total}
    if numbers != expected:
        raise Failed(f"steps in the log: {numbers}; expected {expected}")
    if steps_done(folder) != list(range(1, total + 1)):
        raise Failed(f"metrics.jsonl does not have steps 1 to {total} once each: {steps_done(folder)}")
    restarts = slurm.job(job)["Restarts"]
    print(f"job {job}: {before[-1]} steps, {restarts} requeue, resumed, {total} steps in all", flush=True)


def main() -> int:
    """Run the scenario; 0 when every check passed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="slurm_")).resolve()
    began = time.monotonic()
    slurm = LocalSlurm(folder / "slurm")
    problem = ""
    try:
        prepare(folder)
        slurm.start()
        scenario(slurm, folder)
    except (Failed, RuntimeError, OSError, subprocess.SubprocessError) as error:
        problem = f"FAILED: {error}"
    finally:
        killed = slurm.stop()
    if killed and not problem:
        problem = f"FAILED: left running after the job had finished: {'; '.join(killed)}"
    if problem:
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-8000:]}")
        print(f"{slurm.logs()}\n{problem}\neverything is in {folder}")
        return 1
    print(f"Slurm: {time.monotonic() - began:.0f} s; everything was in {folder}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
