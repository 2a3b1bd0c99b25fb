"""Find the newest good checkpoint of a run, together, and fill the live parts from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vl.checkpoint.folder import (
    checkpoints,
    find,
    half_written,
    missing_latest,
    openable,
    step_of,
)
from megatron_vl.checkpoint.live import Live, set_rng_states
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.checkpoint.saver import all_problems
from megatron_vl.checkpoint.stored import Stored, check_files
from megatron_vl.config.schema import CheckpointConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel.runtime import Runtime


def choose(
    folder: Path, config: CheckpointConfig, runtime: Runtime, say: Callable[[str], None]
) -> Stored | None:
    """The newest checkpoint of ``folder`` whose files are what the manifest says; None when there is none at all.

    Every rank calls it and gets the same. Damaged and half-written ones are named by ``say``.

    Raises:
        CheckpointError: all are damaged; or, under ``checkpoint.strict``, one that is newer than the chosen one is
            damaged or half-written, or ``latest`` names one that is not there.
    """
    found, remarks = _listed(folder, runtime)
    chosen = None
    for candidate in found:
        problem = _problems(candidate, config, runtime)
        if not problem:
            chosen = candidate
            break
        remarks.append(f"damaged checkpoint {candidate}: {problem}")
    if config.strict and remarks:
        listed = "\n  ".join(remarks)
        raise CheckpointError(
            f"checkpoint.strict: {folder} is not in order; remove what is named, or set checkpoint.strict=false to "
            f"use the newest good checkpoint:\n  {listed}"
        )
    if found and chosen is None:
        listed = "\n  ".join(remarks)
        raise CheckpointError(
            f"{folder}: none of its {len(found)} checkpoint(s) is good; bring one back, or use another run_dir to "
            f"start anew:\n  {listed}"
        )
    if chosen is None and any("latest" in remark for remark in remarks):
        raise CheckpointError(
            f"{'; '.join(remarks)}, nor any other checkpoint: the run would start anew; bring it back, or remove "
            f"{folder / 'latest'}"
        )
    for remark in remarks:
        say(f"{remark}; using {chosen}" if chosen else remark)
    return Stored(chosen) if chosen else None


def _listed(folder: Path, runtime: Runtime) -> tuple[list[Path], list[str]]:
    """The checkpoints that rank 0 sees, newest first, and what is not in order in the folder."""
    found: list = [[], [], ""]
    if runtime.rank == 0:
        try:
            there = checkpoints(folder)
            newest = step_of(there[0]) if there else -1
            remarks = [
                f"half-written checkpoint {path}: its saving did not end"
                for path in half_written(folder)
                if step_of(path) > newest
            ]
            pointer = missing_latest(folder)
            found = [there, remarks + ([pointer] if pointer else []), ""]
        except CheckpointError as error:
            found[2] = str(error)  # told to the others first: they would wait for ever
    dist.broadcast_object_list(found, src=0)
    there, remarks, problem = found
    if problem:
        raise CheckpointError(problem)
    return there, remarks


def _problems(candidate: Path, config: CheckpointConfig, runtime: Runtime) -> str:
    """What is wrong with a checkpoint, the same on every rank; the files are read once, by all ranks together."""
    if not candidate.is_dir():
        mine = f"{runtime.name} cannot see {candidate}: run_dir must be on a file system that all nodes share"
    else:
        share = (runtime.rank, runtime.layout.world_size)
        mine = "; ".join(check_files(candidate, config.verify == "digest", share)) or openable(candidate)
    return all_problems(mine, runtime)


def choose_first(path: str, config: CheckpointConfig, runtime: Runtime) -> Stored:
    """The checkpoint that ``train.init_from`` means, the same on every rank, its files checked.

    Raises:
        CheckpointError: none is there, or it is damaged.
    """
    found: list = [None, ""]
    if runtime.rank == 0:
        try:
            found[0] = find(path)
        except CheckpointError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    folder, problem = found
    problem = problem or _problems(folder, config, runtime)
    if problem:
        raise CheckpointError(f"train.init_from = {path}: {problem}")
    return Stored(folder)


def restore(stored: Stored, live: Live, seed: int, say: Callable[[str], None]) -> Progress:
    """Fill weights, optimizer state and random streams of this rank; every rank calls it.

    Random streams continue only in the layout that was saved; in another one they are drawn anew from ``seed`` and
    the step, since they belong to ranks.

    Raises:
        CheckpointError: saved for another model, or a file cannot be read; on every rank.
    """
    progress, problem, fresh = Progress(0, 0), "", []
    try:
        progress = Progress(**stored.state["progress"])
        fresh = live.fill(stored)
        _continue_random_streams(stored, live.runtime, seed + progress.step)
    except CheckpointError as error:
        problem = str(error)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{stored.folder / 'state.json'} is not a state of this version: {error!r}"
    problem = all_problems(problem, live.runtime)
    if problem:
        raise CheckpointError(problem)
    stored.forget()
    if fresh and progress.step:
        say(
            f"{len(fresh)} weights of rank 0 had no optimizer state (frozen, or never trained): it starts at zero"
        )
    return progress


def _continue_random_streams(stored: Stored, runtime: Runtime, seed: int) -> None:
    same_device = (f"rng/{runtime.rank:05d}/cuda" in stored.tensors) == (runtime.device.type == "cuda")
    if stored.state["layout"] == asdict(runtime.layout) and same_device:
        set_rng_states(stored, runtime.rank, runtime.device)
        return
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=runtime.coords.tp, ep_rank=0, etp_rank=0)
