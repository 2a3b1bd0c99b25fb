"""Checkpoints of a run for resuming in the same layout: one file per rank, visible only when complete.

``run_dir/checkpoints/step_00000100/rank_00000.pt`` and ``meta.json``; ``latest`` names the newest. A checkpoint is
written aside under ``.tmp`` and renamed when every rank has finished. Files are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_vl.errors import CheckpointError
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.plan.layout import Layout


@dataclass(frozen=True)
class Progress:
    """step: optimizer steps done. tokens: row tokens consumed. data: what the sample files were."""

    step: int
    tokens: int
    data: str = ""


def save(
    folder: Path, progress: Progress, runtime: Runtime, chunks: list, optimizer: MegatronOptimizer
) -> Path:
    """Write a checkpoint; every rank calls it. Returns its folder.

    Raises:
        CheckpointError: a rank could not write; the older checkpoints are untouched.
    """
    final, aside = folder / f"step_{progress.step:08d}", folder / f"step_{progress.step:08d}.tmp"

    def begin() -> None:
        if runtime.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            meta = {"progress": asdict(progress), "layout": asdict(runtime.layout)}
            (aside / "meta.json").write_text(json.dumps(meta))

    def write() -> None:
        torch.save(_state(chunks, optimizer), aside / f"rank_{runtime.rank:05d}.pt")

    def publish() -> None:
        if runtime.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
            (folder / "latest.tmp").write_text(final.name)
            os.replace(folder / "latest.tmp", folder / "latest")

    for part in (begin, write, publish):
        _on_all_ranks(part, runtime, aside)
    return final


def _on_all_ranks(part: Callable[[], None], runtime: Runtime, where: Path) -> None:
    """Call ``part`` and wait for the others; when it fails on any rank all raise, so that none waits for ever."""
    problem = ""
    try:
        part()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        problem = f"{runtime.name} could not write to {where}: {error}"
    problems: list[str] = [""] * runtime.layout.world_size
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise CheckpointError("; ".join(p for p in problems if p))


def newest(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names, None when there is none yet.

    Raises:
        CheckpointError: ``latest`` names something that is not there.
    """
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    if Path(name).name != name or not (folder / name / "meta.json").is_file():
        raise CheckpointError(
            f"{pointer} names {name!r}, which is no checkpoint in {folder}; correct or remove it"
        )
    return folder / name


def restore(checkpoint: Path, runtime: Runtime, chunks: list, optimizer: MegatronOptimizer) -> Progress:
    """Load this rank's file into the live parts and the random generators.

    Raises:
        CheckpointError: saved in another layout or for another model, or a file is missing or damaged.
    """
    layout = runtime.layout
    try:
        meta = json.loads((checkpoint / "meta.json").read_text())
        progress, saved_layout = Progress(**meta["progress"]), Layout(**meta["layout"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / 'meta.json'} cannot be read: {error!r}") from error
    if saved_layout != layout:
        raise CheckpointError(
            f"{checkpoint} was saved on {saved_layout}; this run has {layout}: resume in the same layout"
        )
    path = checkpoint / f"rank_{runtime.rank:05d}.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        _load(state, chunks, optimizer)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} was saved for another model, precision or optimizer than this run has: {error}; use another "
            "run_dir, or the settings in its config.yaml"
        ) from error
    return progress


def _load(state: dict, chunks: list, optimizer: MegatronOptimizer) -> None:
    """Put a rank's file into the live parts; KeyError, ValueError or RuntimeError when it does not fit."""
    for chunk, weights in zip(chunks, state["chunks"], strict=True):
        live = dict(chunk.module.named_parameters())
        if live.keys() != weights.keys():
            raise ValueError(f"weights differ: {sorted(live.keys() ^ weights.keys())[:4]}")
        for name, parameter in live.items():
            _copy(parameter, weights[name], name)
    for inner, saved in zip(_inner(optimizer), state["optimizers"], strict=True):
        inner.load_state_dict(saved["state"])
        for number, (main, value) in enumerate(zip(_main_parameters(inner), saved["main"], strict=True)):
            _copy(main, value, f"main weight {number}")
    torch.set_rng_state(state["rng"])
    get_cuda_rng_tracker().set_states(state["rng_tracker"])


def _copy(target: torch.nn.Parameter, value: torch.Tensor, name: str) -> None:
    """Copy without broadcasting or conversion."""
    if (target.shape, target.dtype) != (value.shape, value.dtype):
        raise ValueError(
            f"{name} is {tuple(value.shape)} {value.dtype}, here {tuple(target.shape)} {target.dtype}"
        )
    target.data.copy_(value)


def _state(chunks: list, optimizer: MegatronOptimizer) -> dict:
    """Weights, the torch optimizers' state with Adam's step, their fp32 (shards of) main weights, generators."""
    return {
        "chunks": [{n: p.detach().cpu().clone() for n, p in c.module.named_parameters()} for c in chunks],
        "optimizers": [
            {"state": inner.state_dict(), "main": [p.detach().cpu().clone() for p in _main_parameters(inner)]}
            for inner in _inner(optimizer)
        ],
        "rng": torch.get_rng_state(),
        "rng_tracker": get_cuda_rng_tracker().get_states(),
    }


def _inner(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron-Core's; a stage without trainable weights has none."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if part.optimizer is not None]


def _main_parameters(inner: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in inner.param_groups for p in group["params"]]
