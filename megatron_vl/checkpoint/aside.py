"""Writing a folder aside and making it visible whole: refusals, free space, clear errors, nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_vl.checkpoint.torch_dist import sync_folder
from megatron_vl.errors import CheckpointError

KEPT = "CONSUMED"  # a file in a folder aside that holds the only copy of weights


class Aside:
    """``OUT.tmp`` while it is being written. A context: on any error what was written is removed.

    replace: an existing OUT is replaced when the new one is complete. needed: bytes about to be written.

    Raises:
        CheckpointError: OUT exists, OUT.tmp exists, too little free space, no permission.
    """

    def __init__(self, out: Path, needed: int, replace: bool = False) -> None:
        self.final = out.absolute()
        self.folder = self.final.with_name(self.final.name + ".tmp")
        self._replace, self.consumed = replace, False
        if self.final.exists() and not replace:
            raise CheckpointError(f"{out} exists: choose another target, or give --force to replace it")
        if replace and self.final.exists() and not _is_ours(self.final):
            raise CheckpointError(
                f"{out} exists and holds neither a checkpoint nor safetensors: --force does not remove it"
            )
        if (self.folder / KEPT).exists():
            raise CheckpointError(
                f"{self.folder} holds weights whose source an interrupted --consume has removed; move it away first"
            )
        if self.folder.exists() and not replace:
            raise CheckpointError(
                f"{self.folder} exists: another conversion writes it, or one was killed; remove it, or give --force"
            )
        self._needed = needed

    def __enter__(self) -> Aside:
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            check_space(self.folder.parent, self._needed)
            self.folder.mkdir()
        except OSError as error:
            raise explained(error, self.folder) from error
        return self

    def consuming(self) -> None:
        """From now on the folder holds the only copy of some weights: an error does not remove it."""
        (self.folder / KEPT).write_text("The source of these weights was removed by --consume.\n")
        sync_folder(self.folder)
        self.consumed = True

    def publish(self, rename: Callable[[], None] | None = None) -> None:
        """Make the folder visible as OUT. rename: does it itself, for a folder that has to be completed first."""
        (self.folder / KEPT).unlink(missing_ok=True)
        old = self.final.with_name(self.final.name + ".old")
        replaced = self._replace and self.final.exists()
        if replaced:
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.final, old)
        try:
            if rename is None:
                sync_folder(self.folder)
                os.rename(self.folder, self.final)
                sync_folder(self.final.parent)
            else:
                rename()
        except BaseException:
            if replaced:
                os.rename(old, self.final)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            return
        if self.consumed:
            raise CheckpointError(
                f"interrupted ({error}); {self.folder} is kept: it holds the weights that --consume removed"
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError):  # torch.save reports a full disk as RuntimeError
            raise explained(error, self.folder) from error


def check_space(folder: Path, needed: int) -> None:
    """Refuse before a byte is written what the disk cannot hold.

    Raises:
        CheckpointError: with both figures.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; free some, or give a "
            "target on another disk"
        )


def explained(error: Exception, where: Path) -> CheckpointError:
    """An error of the file system as one of ours, with what to do."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC or "No space left" in str(error):
        return CheckpointError(
            f"{where}: the disk is full; what was written is removed. Free space, start again"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CheckpointError(f"{where}: cannot be written ({error}); give a target that you may write")
    return CheckpointError(f"{where}: writing failed ({error}); what was written is removed")


def _is_ours(folder: Path) -> bool:
    """Whether --force may replace the folder: an empty one, or one that a conversion could have written."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return not names or any(name == "manifest.json" or name.endswith(".safetensors") for name in names)
