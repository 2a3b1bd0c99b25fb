"""`benchmark_throughput.py step` on gloo ranks: phases add up, losses are those of plain PyTorch, a fake rank runs."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.bench.phases import PHASES, split
from megatron_vl.bench.step import described
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import DataConfig, ParallelConfig, RecomputeConfig, RunConfig, TrainConfig
from megatron_vl.errors import ConfigErrors
from megatron_vl.plan.cost import sample_flops, tower_and_decoder, train_flops
from megatron_vl.plan.vision_share import CROP, GLOBAL
from tests.bench.on_ranks import against_plain, step_on_rank

ROOT = Path(__file__).parents[2]
RUN = RunConfig(
    model=STEP3_VL_TINY, parallel=ParallelConfig(device="cpu"), data=DataConfig(seq_length=128),
    train=TrainConfig(micro_batch_size=1, global_batch_size=4, train_steps=3),
)  # fmt: skip
OPTIONS = argparse.Namespace(
    warmup=1, steps=2, trace=None, visual_share=None, document_tokens=None, fake_world=None, fake_rank=0
)
YAML = """\
preset: step3_vl_tiny
run_dir: {folder}
parallel: {{device: cpu, timeout_seconds: 120}}
data: {{seq_length: 128}}
train: {{micro_batch_size: 2, global_batch_size: 2}}
"""


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {"pipeline_model_parallel_size": 2}),
        (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2, "vision_placement": "all"}),
    ],
)
def test_layouts(world, ranks, parallel):
    config = replace(
        RUN, parallel=replace(RUN.parallel, **parallel), recompute=RecomputeConfig(vision_chunk_views=2)
    )
    outcomes = world.run(ranks, step_on_rank, config, OPTIONS)
    text, record, good = outcomes[0]
    assert good and not any(text for text, _, _ in outcomes[1:])
    assert all(phase in text for phase in PHASES) and "synthetic rows" in text
    seconds = record["step_seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"] and record["steps"] == 2
    assert 0 < record["processor_seconds"] < 1.5 * ranks * seconds["max"]
    phases = record["phases"]
    assert all(phase["first"] > -1e-6 for phase in phases.values())
    # at two steps the median is their mean, and so are the phases'; the step's time is the slowest rank's
    assert sum(phase["first"] for phase in phases.values()) <= seconds["median"] * (1 + 1e-6)
    assert sum(phase["max"] for phase in phases.values()) >= seconds["median"] * (1 - 1e-6)
    assert phases["vision forward"]["max"] > 0 < phases["vision backward"]["max"]
    assert phases["optimizer"]["first"] > 0 < phases["gradient reduction"]["max"]
    # the log's FLOP count: the same documents and views by hand
    views = record["views"]
    kinds = [CROP] * views["crops"] + [GLOBAL] * views["images"]
    parts = tower_and_decoder(train_flops(STEP3_VL_TINY, sample_flops(STEP3_VL_TINY, kinds, [128] * 4)))
    work = record["model_tflops"] * 1e12 * ranks
    assert sum(parts) / work == pytest.approx(seconds["max"], rel=1e-6)
    assert record["tower_share"] == pytest.approx(parts[0] / sum(parts))


def test_the_step_is_left_as_it_was(world):
    """Twice in one process: the timers of the first are gone, or times would count twice."""
    first, second = (world.run(1, step_on_rank, RUN, OPTIONS)[0][1] for _ in range(2))
    for record in (first, second):
        assert record["phases"]["other"]["first"] < 0.5 * record["step_seconds"]["max"]


def test_a_phase_that_is_missing_shows_as_other():
    found = split(
        {"forward and backward": 3.0, "vision forward": 1.0, "gradient reduction": 0.5, "data": 0.25}, 5.0
    )
    assert found["decoder, head, waiting"] == 1.5 and found["other"] == 1.75
    assert sum(found.values()) == 5.0 and tuple(found) == PHASES


def test_plain_pytorch_is_the_same_model(world):
    """Losses of five steps: forward, gradients, clipping and AdamW are equal, or the third would differ."""
    config = replace(RUN, train=replace(RUN.train, micro_batch_size=2))
    record = world.run(1, against_plain, config, 5)[0]
    assert record["loss_difference"] < 1e-5 and record["turns"] == 5
    assert record["first_losses"]["plain"] == pytest.approx(record["first_losses"]["ours"], rel=1e-6)


def run_tool(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(folder=tmp_path / "run"))
    command = [sys.executable, str(ROOT / "tools/benchmark_throughput.py"), "step", str(path), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_one_rank_of_many_alone(tmp_path):
    """A rank of TP2 x CP4 without the other seven: time, memory, a trace; nothing is sent."""
    trace, record = tmp_path / "trace.json", tmp_path / "step.json"
    done = run_tool(
        tmp_path, "--steps", "1", "--warmup", "0", "--fake-world", "8", "--fake-rank", "5", "--trace", str(trace),
        "--json", str(record), "parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=4",
        "parallel.sequence_parallel=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank 5 of 8 alone" in done.stdout and "TP2 CP4" in done.stdout
    found = json.loads(record.read_text())
    assert found["step_seconds"]["median"] > 0 and len(found["largest"]) >= 3
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.slow
def test_local_ranks_and_against_plain(tmp_path):
    record = tmp_path / "step.json"
    options = ["--steps", "2", "--warmup", "1", "--json", str(record)]
    done = run_tool(tmp_path, "--nproc", "2", *options, "train.micro_batch_size=1")
    assert done.returncode == 0, done.stderr
    assert json.loads(record.read_text())["ranks"] == 2 and done.stdout.count("MFU") == 1
    done = run_tool(tmp_path, "--against-plain", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert found["loss_difference"] < 1e-5 and 0 < found["adapter"]["share"] < 0.05 < found["ratio"]["median"]
    assert run_tool(tmp_path, "--against-plain", "model.freeze_vision=true").returncode == 2


def test_wrong_questions_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(folder=tmp_path / "run"))
    ask = dict(vars(OPTIONS), config=str(path), nproc=3, synthetic=False)
    wrong = ["parallel.tensor_model_parallel_size=2"]
    with pytest.raises(ConfigErrors, match="TP2"):
        described(argparse.Namespace(**ask, overrides=wrong))
    with pytest.raises(ConfigErrors, match="no such file"):
        described(argparse.Namespace(**{**ask, "nproc": 1}, overrides=["data.train=[nowhere.jsonl]"]))
    loaded, own = described(argparse.Namespace(**{**ask, "nproc": 1}, overrides=[]))
    assert not own and loaded.config.train.train_steps == 3 and loaded.config.run_dir.endswith("/benchmark")
