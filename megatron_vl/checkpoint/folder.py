"""The folder of a run's checkpoints: which are there, which is newest, which may go.

``step_00000100`` is complete by construction (it got its name by a rename at the very end), ``step_00000100.tmp`` is
one whose saving has not ended, ``latest`` names the newest for people and tools.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.checkpoint.stored import Stored
from megatron_vl.checkpoint.torch_dist import sync_folder
from megatron_vl.errors import CheckpointError

LATEST = "latest"
ASIDE = ".tmp"
REPLACED = ".old"


def name_of(step: int) -> str:
    """``step_00000100``; longer for more than eight digits."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name, -1 for another name."""
    match = re.fullmatch(r"step_(\d{8,})(?:\.tmp|\.old)?", folder.name)
    return int(match.group(1)) if match else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first.

    Raises:
        CheckpointError: the folder is there but cannot be listed.
    """
    found = [p for p in _listed(folder) if step_of(p) >= 0 and p.suffix not in (ASIDE, REPLACED)]
    return sorted(found, key=step_of, reverse=True)


def half_written(folder: Path) -> list[Path]:
    """Folders of saves that did not end, newest first."""
    return sorted((p for p in leftovers(folder) if p.suffix == ASIDE), key=step_of, reverse=True)


def leftovers(folder: Path) -> list[Path]:
    """What an interrupted save left: half-written folders, and those that it was about to replace."""
    return [p for p in _listed(folder) if step_of(p) >= 0 and p.suffix in (ASIDE, REPLACED)]


def _listed(folder: Path) -> list[Path]:
    try:
        return [p for p in folder.iterdir() if p.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be listed ({error}); give this user access, or use another run_dir"
        ) from error


def missing_latest(folder: Path) -> str:
    """What is wrong with the pointer: it names a checkpoint that is not there; "" when nothing is."""
    pointer = folder / LATEST
    try:
        if not pointer.is_file():
            return ""
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return f"{pointer} cannot be read ({error})"
    if any(path.name == name for path in checkpoints(folder)):
        return ""
    return f"{pointer} names {name[:60]!r}, which is not there"


def point_latest(checkpoint: Path) -> None:
    """Make ``latest`` name the checkpoint; the old content or the new one is there at every moment."""
    pointer = checkpoint.parent / LATEST
    aside = pointer.with_name(LATEST + ASIDE)
    with aside.open("w", encoding="utf-8") as file:
        file.write(checkpoint.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, pointer)
    sync_folder(checkpoint.parent)


def to_remove(steps: Sequence[int], keep_last: int | None, keep_every: int) -> list[int]:
    """Steps that retention gives up: not among the newest ``keep_last`` and no multiple of ``keep_every``.

    keep_last: None keeps all. keep_every: 0 keeps none for good.
    """
    if keep_last is None:
        return []
    old = sorted(steps, reverse=True)[keep_last:]
    return sorted(step for step in old if not (keep_every and step % keep_every == 0))


def set_aside(
    folder: Path, newest: int, keep_last: int | None, keep_every: int
) -> tuple[list[Path], list[str]]:
    """Rename what retention gives up, so that nothing half-removed looks like a checkpoint.

    newest: step that was saved last. Later ones are no part of this run's line (damaged, or rolled back from): they
    neither count nor go. What interrupted saves have left goes too. Returns the renamed folders, to be removed at
    leisure, and sentences about those that could not be renamed.
    """
    going, problems = [path for path in leftovers(folder) if path.suffix == REPLACED], []
    steps = [step for step in map(step_of, checkpoints(folder)) if step <= newest]
    doomed_ones = [folder / name_of(step) for step in to_remove(steps, keep_last, keep_every)]
    for doomed in [*doomed_ones, *half_written(folder)]:
        try:
            # a name that no save writes to: what is being removed must not meet one that begins
            aside = folder / (name_of(step_of(doomed)) + REPLACED)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(doomed, aside)
            going.append(aside)
        except OSError as error:
            problems.append(f"the old checkpoint {doomed} could not be removed: {error}")
    return going, problems


def find(path: str | Path) -> Path:
    """The checkpoint that a user means: a ``step_*`` folder, or the newest one of a checkpoints or run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / "manifest.json").is_file():
            return folder
        pointer = folder / LATEST
        if pointer.is_file() and not missing_latest(folder):
            return folder / pointer.read_text(encoding="utf-8").strip()
        found = checkpoints(folder)
        if found:
            return found[0]
    raise CheckpointError(
        f"{path}: no checkpoint is there; name a step_* folder, or a run folder with checkpoints/step_*"
    )


def openable(checkpoint: Path) -> str:
    """Why a checkpoint cannot be opened, "" when it can."""
    try:
        Stored(checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""
