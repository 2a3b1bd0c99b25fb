"""Verdicts of a judge kept on disk by the content of the question, so that a restart does not ask again.

A folder of JSONL files, one for each process that writes, named at random: no two ever write into the same file, which
needs no locks (network file systems are poor at those). A process reads all files when it starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

from megatron_vl.errors import DataError


def content_key(content: Mapping) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class KeptVerdicts:
    """Texts by key, also while they are being found out: threads that ask the same at once ask it once.

    folder: None keeps them in memory only. Lines that were cut off when a process was killed are skipped and counted
    in `damaged`. Raises DataError when the folder cannot be used.
    """

    def __init__(self, folder: Path | None):
        self.hits = self.damaged = 0
        self._lock = threading.Lock()
        self._known: dict[str, Future[str]] = {}
        self._file = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.jsonl")):
                self._read(path)
            self._file = open(folder / f"{uuid.uuid4().hex}.jsonl", "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise DataError(
                f"{folder}: verdicts cannot be kept there ({error.strerror}); name a folder that can be written"
            ) from error

    def get(self, key: str, find_out: Callable[[], str]) -> str:
        """The text of the key, from `find_out` if it is not known. What `find_out` raises is raised and not kept."""
        with self._lock:
            future = self._known.get(key)
            mine = future is None
            if mine:
                future = self._known[key] = Future()
            else:
                self.hits += 1
        if not mine:
            return future.result()
        try:
            text = find_out()
            self._write(key, text)
        except BaseException as error:
            with self._lock:
                del self._known[key]
            future.set_exception(error)
            raise
        future.set_result(text)
        return text

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                key, text = record["key"], record["text"]
            except (ValueError, LookupError, TypeError):
                self.damaged += 1
                continue
            future = self._known[key] = Future()
            future.set_result(text)

    def _write(self, key: str, text: str) -> None:
        if self._file:
            line = json.dumps({"key": key, "text": text}).encode() + b"\n"
            with self._lock:
                os.write(self._file.fileno(), line)
