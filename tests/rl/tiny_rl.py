"""A small run of reinforcement learning: weights that have learnt a little, prompts with tasks, its description."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.processes import Command, pretrain
from tests.train.tiny_run import make_files, read_lines, write_config

STEPS = 70  # of pre-training: enough that answers end and some are right
KEYS = [
    f"train.train_steps={STEPS}",
    "schedule.phases=[{tokens: 36000, lr_start: 0.004, lr_end: 0.001}]",
    "schedule.warmup_tokens=2000",
]


def with_processes(config: Path) -> None:
    """Pre-train in a process of its own."""
    command = pretrain(config.parent, config, 1, *KEYS)
    assert command.wait(300) == 0, command.output


def prepare_files(folder: Path, train: Callable[[Path], object] = with_processes) -> Path:
    """Pictures, conversations and the checkpoint of a short pre-training run in ``folder``."""
    make_files(folder, samples=24, heldout=6)
    train(write_config(folder, folder / "first"))
    for split in ("train", "eval"):
        records = [with_task(record) for record in read_lines(folder / f"{split}.jsonl")]
        (folder / f"{split}_prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def with_task(record: dict) -> dict:
    """The conversation as a prompt: its answer is what is asked for."""
    answer = record["messages"][-1]["content"]
    source = "count" if answer in ("three", "five") else "colour"
    return {**record, "source": source, "task": {"kind": "exact", "answer": answer, "thinking": False}}


def write_rl_config(data: Path, run_dir: Path, **rl: Any) -> Path:
    """A configuration beside ``run_dir``: 4 prompts x 4 samples, 3 iterations."""
    rollout = {
        "prompts_per_iteration": 4,
        "samples_per_prompt": 4,
        "max_tokens": 10,
        "open_thinking": False,
        "wave": 4,
    }
    description = {
        "preset": "step3_vl_tiny",
        "model": {"freeze_vision": True, "freeze_projector": True},
        "run_dir": str(run_dir),
        "parallel": {"device": "cpu", "timeout_seconds": 120},
        "data": {
            "data_root": str(data),
            "tokenizer": str(data / "text.model"),
            "seq_length": 128,
            "packing": {"enabled": True, "pad_multiple": 8},
        },
        "optim": {"weight_decay": 0.0},
        "train": {"init_from": str(data / "first")},
        "checkpoint": {"save_interval": 1, "keep_last": 2},
        "rl": {
            "prompts": [str(data / "train_prompts.jsonl")],
            "eval_prompts": [str(data / "eval_prompts.jsonl")],
            "iterations": 3,
            "actor": {"lr": 5e-4},
            "critic": {"lr": 1e-3, "updates": 2},
            "ppo": {"mini_batches": 2},
            "rollout": rollout,
            **rl,
        },
    }
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(description))
    return path


def reinforce(folder: Path, config: Path, ranks: int, *overrides: str) -> Command:
    """`python -m megatron_vl rl CONFIG --nproc N ...`."""
    return Command(folder, "-m", "megatron_vl", "rl", str(config), *overrides, "--nproc", str(ranks))


def curve(run_dir: Path) -> dict[int, tuple[float, float, float]]:
    """(mean reward, value loss, policy gradient norm) by iteration."""
    return {
        r["step"]: (r["reward/mean"], r["critic/loss"], r["policy/grad_norm"])
        for r in read_lines(run_dir / "metrics.jsonl")
        if "reward/mean" in r
    }


def assert_same_curve(run_dir: Path, other: Path) -> None:
    """Equal within 1e-6, iteration by iteration."""
    got, expected = curve(run_dir), curve(other)
    assert list(got) == list(expected)
    for iteration, numbers in expected.items():
        assert got[iteration] == pytest.approx(numbers, abs=1e-6), iteration


def trained_samples(run_dir: Path) -> list[list[tuple]]:
    """(prompt, sample, seed, weights, text, reward) of every response, iteration by iteration."""
    keys = ("prompt_id", "sample", "seed", "weight_version", "text", "reward")
    return [
        sorted(tuple(record[key] for key in keys) for record in read_lines(path))
        for path in sorted((run_dir / "rollouts").glob("*.jsonl"))
    ]
