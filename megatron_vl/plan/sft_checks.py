"""What a stage of fine-tuning asks beyond any training run. Returns ALL problems and raises nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_vl.config.load import load_run
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError, Problem
from megatron_vl.plan.budget import total_steps


def check_sft(config: RunConfig) -> list[Problem]:
    """Weights to start from, of a run that is finished; loss on answers only. Reads the disk.

    A run that continues from a checkpoint of its own takes no first weights, so nothing is asked of them.
    """
    problems = [*_loss(config)]
    if not (Path(config.run_dir) / "checkpoints" / "latest").is_file():
        problems += [*_first_weights(config)]
    return problems


def _loss(config: RunConfig) -> Iterator[Problem]:
    if config.data.loss_on == "all_text":
        yield Problem(
            "data.loss_on",
            "all_text",
            "fine-tuning learns answers, not the questions and roles around them",
            "choose assistant or assistant_last, or run `pretrain`",
        )


def _first_weights(config: RunConfig) -> Iterator[Problem]:
    train = config.train
    if train.init_from is None and train.init_from_hf is None:
        yield Problem(
            "train.init_from",
            None,
            f"fine-tuning starts from weights, and {config.run_dir} holds no checkpoint to go on from",
            "name a run or a checkpoint here, or a released checkpoint in train.init_from_hf",
        )
    elif train.init_from is not None:
        yield from _unfinished(Path(train.init_from))


def _unfinished(run: Path) -> Iterator[Problem]:
    """The run before it has not reached its last step: taken from the names on disk, so that no rank has to start.

    Somebody who wants its weights all the same names the checkpoint. A folder that is no run has nothing to finish.
    """
    latest, written = run / "checkpoints" / "latest", run / "config.yaml"
    if not (latest.is_file() and written.is_file()):
        return
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    match = re.fullmatch(r"step_(\d+)", name)
    try:
        wanted = total_steps(load_run(str(written)).config)
    except ConfigError:  # of another version: what is wrong with the checkpoint is said when it is opened
        return
    if match and wanted is not None and int(match.group(1)) < wanted:
        yield Problem(
            "train.init_from",
            str(run),
            f"this run has done {int(match.group(1)):,} of its {wanted:,} steps",
            f"finish it, or name the checkpoint that is meant: {run / 'checkpoints' / name}",
        )
