"""A small run with pictures: its files, its description, and what tests read of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from megatron_vl.config.load import LoadedRun
from megatron_vl.data.tokenizer import train_sentencepiece
from megatron_vl.plan.checks import load_checked_run
from tests.data.tiny import TEXTS, chat, write_jsonl

COLOURS = {"red": (210, 20, 20), "green": (10, 160, 30), "blue": (20, 40, 220), "white": (250, 250, 250)}
SEQ_LENGTH, BATCH, STEPS = 64, 8, 8
TOKENS_PER_STEP = SEQ_LENGTH * BATCH

# name: (ranks, keys)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "dp2": (2, []),
    "cp2": (2, ["parallel.context_parallel_size=2"]),
    "tp2pp2": (4, ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]),
    "dp2tp2": (4, ["parallel.tensor_model_parallel_size=2"]),
}


def make_files(folder: Path, samples: int = 24, heldout: int = 11) -> Path:
    """train.jsonl, eval.jsonl, text.model and pictures.

    Of three samples one has a picture with 3 crops, one a small picture, one none.
    """
    train_sentencepiece([*TEXTS, *COLOURS, "The circle is", "How many?"] * 3, str(folder / "text.model"), 300)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"small_{name}.jpg")
        Image.new("RGB", (160, 60), colour).save(folder / f"wide_{name}.png")
    for split, count in (("train", samples), ("eval", heldout)):
        write_jsonl(folder / f"{split}.jsonl", [_record(split, number) for number in range(count)])
    return folder


def _record(split: str, number: int) -> dict:
    colour = list(COLOURS)[number % 4]
    kind = number % 3
    if kind == 2:
        return chat(f"How many? {number}", "three" if number % 2 else "five", id=f"{split}{number}")
    image = f"wide_{colour}.png" if kind else f"small_{colour}.jpg"
    return chat("What colour is the circle?", f"The circle is {colour}.", image, id=f"{split}{number}")


def write_config(data: Path, run_dir: Path, **train: Any) -> Path:
    """A configuration beside `run_dir`: the tiny preset on CPU, a schedule longer than the run."""
    description = {
        "preset": "step3_vl_tiny",
        "run_dir": str(run_dir),
        "parallel": {"device": "cpu", "timeout_seconds": 120},
        "data": {
            "train": [str(data / "train.jsonl")],
            "eval": [str(data / "eval.jsonl")],
            "data_root": str(data),
            "tokenizer": str(data / "text.model"),
            "seq_length": SEQ_LENGTH,
            "num_workers": 0,
        },
        "schedule": {
            "warmup_tokens": 2 * TOKENS_PER_STEP,
            "phases": [
                {"tokens": 6 * TOKENS_PER_STEP, "lr_start": 2e-3, "lr_end": 1e-3, "style": "cosine"},
                {"tokens": 6 * TOKENS_PER_STEP, "lr_start": 1e-3, "lr_end": 1e-4, "style": "linear"},
            ],
        },
        "train": {"micro_batch_size": 2, "global_batch_size": BATCH, "train_steps": STEPS, **train},
    }
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(description))
    return path


def load(config: Path, layout: str = "1", *overrides: str) -> LoadedRun:
    """The checked description for a layout of LAYOUTS."""
    ranks, keys = LAYOUTS[layout]
    return load_checked_run(str(config), [*keys, *overrides], None, ranks, to_train=True)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, from metrics.jsonl."""
    return {r["step"]: r["loss"] for r in read_lines(run_dir / "metrics.jsonl") if "loss" in r}
