"""One builder at a time for something that several runs share in a folder, also across machines.

The lock is a file that only one process can create (O_EXCL), with a sign of life written into it every few seconds:
file locks of the kernel are not dependable on network file systems, and a plain file would outlive a killed holder. Who
waits watches the content by its own clock, so clocks of machines need not agree. A silent holder is not robbed of its
file: the next generation of the lock, `NAME.lock-2`, is created beside it, which again only one can do. A holder that
was merely asleep finds the newer generation and gives up.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron_vl.errors import DataError

BEAT_SECONDS = 3.0
SILENT_SECONDS = 60.0
SECONDS_BETWEEN_LINES = 10.0


class BuildLock:
    """To be used with `with`: waits for its turn, and gives the lock back at the end.

    path: what is built; the lock lies beside it. silent_seconds: a holder without a sign of life for so long is taken
    for dead. say: is told every few seconds who is waited for.
    """

    def __init__(
        self,
        path: Path,
        say: Callable[[str], None],
        silent_seconds: float = SILENT_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
    ):
        self._path, self._say = path, say
        self._silent_seconds, self._beat_seconds = silent_seconds, beat_seconds
        self._holder = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex[:12]}"
        self._mine: Path | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beats, daemon=True)

    def __enter__(self) -> BuildLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        seen, since, say_next = "", time.monotonic(), 0.0
        while True:
            generation, content = self._newest()
            if content != seen:
                seen, since = content, time.monotonic()
            free = not generation or time.monotonic() - since > self._silent_seconds
            if free and self._create(generation + 1):
                break
            if generation and time.monotonic() >= say_next:  # again and again: silence would look like a hang
                say_next = time.monotonic() + SECONDS_BETWEEN_LINES
                holder = content.partition("\n")[0]
                self._say(f"{self._path}: is being built by {holder}; waiting for it")
            time.sleep(min(1.0, self._beat_seconds))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._owner(self._mine) != self._holder:
            return  # taken over and given back meanwhile: this is somebody else's
        for generation, path in sorted(self._files()):  # the oldest first: no dead one is left as the newest
            if generation <= _generation(self._mine):
                path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises DataError when another process has taken over, since this one gave no sign of life for long."""
        newest, content = self._newest()
        if newest != _generation(self._mine) or not content.startswith(self._holder):
            raise DataError(
                f"{self._path}: {content.partition(chr(10))[0] or 'another process'} took over building it, since "
                f"this process was silent for {self._silent_seconds:g} s; start again to use what it makes"
            )

    def _create(self, generation: int) -> bool:
        path = self._path.with_name(f"{self._path.name}.lock-{generation}")
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{self._holder}\n0\n")
        self._mine = path
        return True

    def _beats(self) -> None:
        count = 0
        while not self._ended.wait(self._beat_seconds):
            count += 1
            try:
                # Content and not the time of change: opening a file shows other machines' writes also on NFS.
                with open(self._mine, "r+") as file:
                    if not file.read().startswith(self._holder):
                        return  # taken over and given back meanwhile: this is somebody else's
                    file.seek(0)
                    file.write(f"{self._holder}\n{count}\n")
            except OSError:
                continue  # the same, or a file system that stalls: `check` says so

    def _newest(self) -> tuple[int, str]:
        """(generation, content) of the newest lock file; (0, "") when there is none."""
        generation, path = max(self._files(), default=(0, None))
        try:
            return (generation, path.read_text(errors="replace")) if path else (0, "")
        except FileNotFoundError:
            return 0, ""

    def _owner(self, path: Path) -> str:
        try:
            return path.read_text(errors="replace").partition("\n")[0]
        except FileNotFoundError:
            return ""

    def _files(self) -> list[tuple[int, Path]]:
        pattern = re.compile(re.escape(self._path.name) + r"\.lock-\d+")
        return [(_generation(p), p) for p in self._path.parent.iterdir() if pattern.fullmatch(p.name)]


def _generation(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
