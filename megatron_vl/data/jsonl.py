"""JSONL files as one indexed source: any line of any file by number, without reading what comes before."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from megatron_vl.data.sample import Sample, parse_sample
from megatron_vl.errors import DataError

_CHUNK_BYTES = 1 << 24
_LONGEST_BLANK_LINE = 16


@dataclass(frozen=True)
class RawLine:
    """One line as it stands in its file. source: path. line: number, from 1. data: without newline."""

    source: str
    line: int
    data: bytes

    @property
    def default_id(self) -> str:
        """The id of a sample that brings none."""
        return f"{os.path.basename(self.source)}:{self.line}"

    def parse(self) -> Sample:
        """The sample of the line. Raises SampleRefused: see `parse_sample`."""
        return parse_sample(self.data, self.default_id)

    def content(self) -> bytes:
        """All that `parse` looks at. Images in files of their own are not part of it."""
        return self.data


class JsonlSource:
    """Several JSONL files in the given order, addressed as one list of lines. Blank lines are not samples.

    The byte offsets are found by one scan at construction (int64, 16 bytes per line) and travel to worker
    processes with the object; file handles are opened where they are used. Raises DataError for a file that
    is missing, not readable or without any line.
    """

    def __init__(self, paths: Sequence[str]):
        if not paths:
            raise DataError("no JSONL file is given; name at least one, e.g. data.train=[train.jsonl]")
        self.paths = [os.fspath(path) for path in paths]
        self._files = [_scan(path) for path in self.paths]
        self._first_index = [0]
        for file in self._files:
            self._first_index.append(self._first_index[-1] + len(file.starts))
        self._handles: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return self._first_index[-1]

    def __getitem__(self, index: int) -> RawLine:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._first_index, index) - 1
        within = index - self._first_index[number]
        file = self._files[number]
        start, length = int(file.starts[within]), int(file.lengths[within])
        handle = self._handles.get(number)
        if handle is None:
            # Kept open for the next line: opening is what costs on network file systems.
            handle = self._handles[number] = open(self.paths[number], "rb")  # noqa: SIM115
        handle.seek(start)
        data = handle.read(length)
        if len(data) != length:
            raise DataError(
                f"{self.paths[number]}: shorter than when it was indexed; do not change data during a run"
            )
        return RawLine(self.paths[number], int(file.line_numbers[within]), data)

    def describe(self) -> list[dict[str, int | str]]:
        """Path, bytes and number of samples per file."""
        return [
            {"path": path, "bytes": file.size, "samples": len(file.starts)}
            for path, file in zip(self.paths, self._files)
        ]

    def digests(self) -> list[str]:
        """sha256 of each file: what must not change before a run is resumed. Found by the same one scan."""
        return [file.sha256 for file in self._files]

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": {}}


@dataclass(frozen=True)
class _FileIndex:
    size: int
    starts: np.ndarray
    lengths: np.ndarray
    line_numbers: np.ndarray
    sha256: str


def _scan(path: str) -> _FileIndex:
    """Offsets and lengths of the lines of one file that are not blank."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            newlines, base, seen = [], 0, hashlib.sha256()
            while chunk := file.read(_CHUNK_BYTES):
                newlines.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + base)
                seen.update(chunk)
                base += len(chunk)
            ends = np.concatenate(newlines).astype(np.int64) if newlines else np.empty(0, dtype=np.int64)
            if base > (int(ends[-1]) + 1 if len(ends) else 0):
                ends = np.append(ends, base)
            starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1] + 1])[: len(ends)]
            keep = np.ones(len(ends), dtype=bool)
            for number in np.flatnonzero(ends - starts <= _LONGEST_BLANK_LINE):
                file.seek(int(starts[number]))
                keep[number] = bool(file.read(int(ends[number] - starts[number])).strip())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); correct the path in data.train or data.eval"
        ) from error
    if not keep.any():
        raise DataError(f"{path}: holds no sample; every line that is not blank must be one JSON object")
    lengths = ends - starts
    return _FileIndex(size, starts[keep], lengths[keep], np.flatnonzero(keep) + 1, seen.hexdigest())
