"""`tools/plan_parallelism.py --measure`: which layouts are tried, what becomes of a trial, how they are ranked anew."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_vl.bench import trials
from megatron_vl.bench.measured import Measured, Trial, main, measured_lines, reranked
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import DataConfig, RunConfig, TrainConfig
from megatron_vl.errors import ConfigError
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.devices import DEVICES
from megatron_vl.plan.plan_lines import block
from megatron_vl.plan.search import Planner, Question

ROOT = Path(__file__).parents[2]
YAML = """\
preset: step3_vl_tiny
run_dir: {folder}
parallel: {{timeout_seconds: 120}}
data: {{seq_length: 128}}
train: {{micro_batch_size: 1, global_batch_size: 4, init_from_hf: nowhere}}
"""
# Stands for benchmark_throughput.py: TP2 has no memory, CP2 never ends, DP2 takes longer than PP2.
STAND_IN = """\
import json, os, sys, time
import yaml
run = yaml.safe_load(open(sys.argv[2]))
path = sys.argv[sys.argv.index("--json") + 1]
parallel, train = run["parallel"], run["train"]
assert parallel["device"] == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == "" and train["init_from_hf"] is None
assert "--synthetic" in sys.argv and sys.argv[sys.argv.index("--visual-share") + 1] == "0.25"
assert "--document-tokens" not in sys.argv
if parallel["tensor_model_parallel_size"] == 2:
    print("RuntimeError: later\\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    sys.exit(1)
if parallel["context_parallel_size"] == 2:
    time.sleep(60)
seconds = 2.0 if parallel["pipeline_model_parallel_size"] == 1 else 1.5
steps = int(sys.argv[sys.argv.index("--steps") + 1])
record = {
    "step_seconds": {"median": seconds, "min": seconds - 0.5, "max": seconds + steps}, "processor_seconds": 3.25,
    "memory_bytes": 3 << 30, "machine": {"device": "abacus", "torch": "2.0"}, "data": "rows of beads",
}
json.dump(record, open(path, "w"))
"""


def planner_of(length: int = 128) -> Planner:
    config = RunConfig(
        model=STEP3_VL_TINY, data=DataConfig(seq_length=length), train=TrainConfig(global_batch_size=4)
    )
    return Planner(Question(config, DEVICES["CPU"], 2, visual_share=0.3))


def of_seconds(seconds: float, processor: float = 2.5) -> Measured:
    return Measured(seconds, seconds - 0.01, seconds + 0.5, processor, 3 << 29, "abacus", "rows of beads")


def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(folder=tmp_path / "out"))
    return str(path)


def test_ranked_by_what_was_measured():
    planner = planner_of()
    best = planner.answer(4).best
    found = [of_seconds(0.75), "no end within 5 s", of_seconds(0.25), "out of memory: all of it"]
    ranked = reranked([Trial(place, *pair) for place, pair in enumerate(zip(best, found), 1)])
    assert [trial.place for trial in ranked] == [3, 1, 2, 4]
    lines = measured_lines(planner, ranked[::-1])
    assert lines[0].startswith("2 of 4 layouts measured, fastest first, on 2 ranks of abacus")
    rows = [line.split() for line in lines[2:7]]
    assert [row[:2] for row in rows] == [["place", "before"], ["1", "3"], ["2", "1"], ["-", "2"], ["-", "4"]]
    predicted = best[2].time.total
    assert [f"{predicted:.4g}", "0.25", "0.24", "0.75", f"{0.25 / predicted:.2f}", "2.5"] == rows[1][13:19]
    assert rows[1][-1] == "1.50"
    assert lines[5].endswith("  no end within 5 s") and lines[6].endswith("  out of memory: all of it")
    assert "\n".join(lines).endswith(
        "# the fastest measured, for 2 ranks\n" + block(best[2].candidate).rstrip()
    )


def test_a_shared_machine_is_told_by_processor_seconds():
    planner = planner_of()
    best = planner.answer(2).best
    said = "Place 2 took the fewest processor seconds"
    for second, told in ((2.0, True), (3.0, False)):
        found = [of_seconds(0.25), of_seconds(0.75, second)]
        lines = measured_lines(
            planner, [Trial(place, *pair) for place, pair in enumerate(zip(best, found), 1)]
        )
        assert any(line.startswith(said) for line in lines) == told


def test_no_trial_ended():
    planner = planner_of()
    trials_of = [Trial(1, planner.answer(1).best[0], "exit code 3")]
    lines = measured_lines(planner, trials_of)
    assert lines[-1] == "No trial came to its end." and not any("parallel:" in line for line in lines)


def test_trials_that_fail_do_not_stop_the_others(tmp_path, capfd):
    """All four (TP, CP, PP) of two ranks, with a stand-in for the benchmark."""
    tool, run = tmp_path / "stand_in.py", run_file(tmp_path)
    tool.write_text(STAND_IN)
    options = [
        "--gpu",
        "CPU",
        "--gpus",
        "2",
        "--visual-share",
        "0.25",
        "--measure",
        "4",
        "--measure-steps",
        "2",
    ]
    assert main([run, *options, "--measure-seconds", "4"], [sys.executable, str(tool)]) == 0
    out, err = capfd.readouterr()
    assert "2 of 4 layouts measured, fastest first, on 2 ranks of abacus with torch 2.0; rows of beads" in out
    rows = [line for line in out[out.index("layouts measured") :].splitlines() if "none/none" in line]
    assert [row.split()[0] for row in rows] == ["1", "2", "-", "-"]
    assert " 1.5 " in rows[0] and " 3.5 " in rows[0] and " 2 " in rows[1]
    reasons = "\n".join(rows[2:])
    assert "out of memory: torch.OutOfMemoryError: CUDA out of memory" in reasons
    assert "no end within 4 s" in reasons and "/measured/" in reasons
    assert err.count("trial ") == 4
    answer = yaml.safe_load(out[out.index("# the fastest measured") :])
    assert answer["parallel"]["pipeline_model_parallel_size"] == 2
    file = tmp_path / "best.yaml"
    file.write_text(out[out.index("# the fastest measured") :])
    keys = ["preset=step3_vl_tiny", "data.seq_length=128", "train.global_batch_size=4"]
    load_checked_run(str(file), keys, world_size=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--measure", "0"], "--measure 0: must be a number above 0"),
        (["--measure", "2", "--measure-steps", "0"], "--measure-steps 0"),
        (["--measure", "2", "--measure-seconds", "-1"], "--measure-seconds -1"),
        (["--measure", "2", "--measure-seconds", "inf"], "--measure-seconds inf"),
        (["--measure", "5", "--top", "3"], "the table has --top 3 rows"),
        (["--measure", "2", "--gpu", "H100"], "2 x H100 are asked for, and this machine has 1 CUDA device"),
        (["--measure", "2", "data.seq_length=8"], "images are 10 tokens a row"),
        (
            ["--measure", "2", "data.packing.enabled=true", "--document-tokens", "8"],
            "does not fit a document of 8",
        ),
    ],
)
def test_mistakes(tmp_path, monkeypatch, options, told):
    monkeypatch.setattr(trials.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=told):
        main([run_file(tmp_path), "--gpus", "2", "--gpu", "CPU", *options], [])


def test_no_gpu_here(tmp_path, monkeypatch):
    monkeypatch.setattr(trials.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"has 0 CUDA device\(s\); use --gpu CPU"):
        main([run_file(tmp_path), "--gpus", "2", "--gpu", "H100", "--measure", "1"], [])


def test_ranks_of_another_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="not under torchrun"):
        main([run_file(tmp_path), "--gpus", "2", "--gpu", "CPU", "--measure", "1"], [])


def test_nothing_outlives_a_trial(tmp_path):
    """A process that its parent has started, as a launcher starts ranks, ends with it."""
    pid = tmp_path / "pid"
    script = f"sleep 300 & echo $! > {pid}; wait"
    began = time.monotonic()
    assert trials.ended(["bash", "-c", script], dict(os.environ), subprocess.DEVNULL, 1.0) is None
    assert time.monotonic() - began < 30
    state = Path(f"/proc/{int(pid.read_text())}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert trials.ended(["bash", "-c", "exit 7"], dict(os.environ), subprocess.DEVNULL, 30.0) == 7


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("noise\nbenchmark_throughput.py: data.seq_length = 3: no\n", "data.seq_length = 3: no"),
        ("Traceback\n  File\nRuntimeError: boom\nValueError: since\n", "RuntimeError: boom"),
        ("rank 0 ended with exit code 1\n[rank2]: AttributeError: no x\n", "AttributeError: no x"),
        ("torch.distributed.DistBackendError: NCCL\n", "torch.distributed.DistBackendError: NCCL"),
        ("DefaultCPUAllocator: can't allocate memory: you tried", "out of memory: DefaultCPUAllocator"),
        (
            "rank 1 (tp1) was killed by SIGKILL; stopping the other ranks",
            "rank 1 (tp1) was killed by SIGKILL",
        ),
        ("nothing to see", "exit code 9"),
    ],
)
def test_reasons(output, told):
    assert trials.reason_of(9, output, False).startswith(told)
    assert trials.reason_of(1, output, True) == "a loss was not finite"


@pytest.mark.slow
def test_live_trials(tmp_path):
    """The tool itself on two gloo ranks: two layouts of the tiny model, as they really run."""
    command = [
        sys.executable, str(ROOT / "tools/plan_parallelism.py"), run_file(tmp_path), "--gpu", "CPU", "--gpus", "2",
        "--measure", "2", "--measure-steps", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 layouts measured, fastest first, on 2 ranks of " in done.stdout
    assert "# the fastest measured, for 2 ranks" in done.stdout and done.stderr.count("trial ") == 2
    assert (tmp_path / "out/measured/2/step.json").exists()
