"""Files that are complete or not there, whoever else writes them at the same time."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a name of its own beside `path`, and renames it: the last one to finish wins."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.writing")
    try:
        with open(aside, "wb") as file:
            content(file)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
