"""A checkpoint's weights through the live ranks of a layout and out again by the trainer's own save."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_vl.checkpoint.folder import find
from megatron_vl.checkpoint.live import Live
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.checkpoint.saver import Saver
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.checkpoint.weights import CheckpointWeights
from megatron_vl.config.dump import to_mapping, to_yaml
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parallel.world import LocalWorld
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.train.build import build

FIXED = ("parallel.device=cpu", "precision.params=fp32")
HOURS = 3600.0


def resave(checkpoint: Path, out: Path, ranks: int, settings: Sequence[str]) -> Path:
    """Load the weights in fp32 into ``ranks`` CPU ranks laid out by ``settings`` and save them to ``out``.

    Progress and source formats are kept, so that an export gives back the bits. Optimizer state is not carried.

    Raises:
        CheckpointError: no checkpoint, or the target exists. ConfigErrors: an illegal layout.
    """
    stored = CheckpointWeights(find(checkpoint)).stored
    if out.exists():
        raise CheckpointError(f"{out} exists: choose another target")
    config = layout_of(stored, ranks, settings)
    aside = out.absolute().with_name(out.name + ".resave")
    if aside.exists():
        raise CheckpointError(f"{aside} exists: another resave writes it, or one was killed; remove it")
    try:
        with LocalWorld(ranks) as world:
            written = world.run(ranks, resave_on_rank, config, stored.folder, aside, limit=6 * HOURS)[0]
        os.rename(written, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def layout_of(stored: Stored, ranks: int, settings: Sequence[str]) -> RunConfig:
    """A run of the checkpoint's model in the layout of ``settings``, everything else at its default."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.yaml")
        file.write_text(yaml.safe_dump({"model": to_mapping(stored.model)}), encoding="utf-8")
        return load_checked_run(str(file), [*FIXED, *settings], world_size=ranks).config


def resave_on_rank(config: RunConfig, checkpoint: Path, folder: Path) -> Path:
    """What every rank of a world does; returns the folder that was written below ``folder``."""
    stored = Stored(checkpoint)
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    parts = build(config, runtime, stored.weight, with_optimizer=False)
    patient = replace(config.checkpoint, async_save=False)
    placement = config.parallel.vision_placement
    live = Live(config.model, placement, runtime, parts.stages, parts.chunks, optimizer=None)
    saver = Saver(folder, patient, live, to_yaml(config), lambda text: None)
    saver.source_dtypes = stored.state.get("source_dtypes")
    saver.begin(Progress(**stored.state["progress"]))
    assert saver.last is not None
    return folder / f"step_{saver.last.step:08d}"
