"""Safetensors files read and written in pieces, so that no tensor has to be whole in memory.

The format: 8 bytes with the length of the header (little-endian), the header (JSON: name -> dtype, shape, offsets
behind the header; filled up with spaces to a multiple of 8), then the raw little-endian values without gaps. The
``safetensors`` library writes only from whole tensors and reads through a memory map; files written here are read
back by it (tests/checkpoint/test_hf_save.py).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_vl.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the library's own limit
# Written values go to the disk, and out of the page cache, after so many bytes: a big file does not push out what
# others have cached, and pages are used again. (Writing into pages that the machine had not used yet took 2 s of
# system time per GB, later writes 0.3 s; one try on a virtual machine, so the cause is a guess.)
FLUSH_BYTES = 128 << 20
METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorSpec:
    """Name, number format and shape of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def bytes_of(values: torch.Tensor) -> np.ndarray:
    """The raw bytes of a tensor in row order, without a copy where it is contiguous. uint8 ``[nbytes]``."""
    assert sys.byteorder == "little", "the files are little-endian"
    return values.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def header_of(specs: Sequence[TensorSpec]) -> bytes:
    """Length and header of a file that holds the tensors in this order."""
    table: dict[str, object] = {METADATA: {"format": "pt"}}
    start = 0
    for spec in specs:
        stop = start + spec.nbytes
        table[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def flush(descriptor: int) -> None:
    """What a file holds to the disk and out of the page cache."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def flush_file(path: Path) -> None:
    """`flush` of a file that another one writes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def forget(path: Path, start: int, length: int) -> None:
    """A part of a file that was read once leaves the page cache; it does not where it is not on the disk yet."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class ShardWriter:
    """One new file; pieces of its tensors may be written in any order and from several threads.

    Raises:
        OSError: no space, no permission, or the file exists.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header = header_of(specs)
        self.path, self._starts, self._dirty = path, {}, 0
        self.nbytes = len(header)
        for spec in specs:
            self._starts[spec.name] = self.nbytes
            self.nbytes += spec.nbytes
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(0, memoryview(header))

    def write(self, name: str, offset: int, values: torch.Tensor) -> None:
        """Put ``values`` at ``offset`` bytes into the tensor ``name``."""
        self._write(self._starts[name] + offset, memoryview(bytes_of(values)))

    def _write(self, position: int, data: memoryview) -> None:
        self._dirty += len(data)  # a lost count of another thread only makes the next flush later
        while data:
            done = os.pwrite(self._file, data, position)
            position, data = position + done, data[done:]
        if self._dirty >= FLUSH_BYTES:
            self._dirty = 0
            self.sync()

    def sync(self) -> None:
        """To the disk; its pages leave the cache."""
        flush(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


@dataclass(frozen=True)
class _Place:
    spec: TensorSpec
    start: int


class ShardReader:
    """Reads pieces of a file's tensors with plain reads, from several threads.

    Raises:
        CheckpointError: not a safetensors file, shorter than its header says, or of a number format that no
            released checkpoint has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened ({error.strerror})") from error
        try:
            self._places = self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            self.close()
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error

    def _read_header(self) -> dict[str, _Place]:
        size = os.fstat(self._file.fileno()).st_size
        descriptor = self._file.fileno()
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{size} bytes, the header alone should have {length}")
        table: Mapping = json.loads(os.pread(descriptor, length, 8))
        places = {}
        for name, entry in table.items():
            if name == METADATA:
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is {entry['dtype']}, known are {', '.join(DTYPES)}")
            spec = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            start, stop = entry["data_offsets"]
            if stop - start != spec.nbytes or start < 0 or 8 + length + stop > size:
                raise ValueError(
                    f"{name} should lie at {start}:{stop} of {size - 8 - length} bytes; download the file again"
                )
            places[name] = _Place(spec, 8 + length + start)
        return places

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the file, in its order."""
        return {name: place.spec for name, place in self._places.items()}

    def read(self, name: str, first: int, rows: int) -> torch.Tensor:
        """``rows`` rows of the matrix (flattened behind the first axis) from row ``first`` on.

        Raises:
            CheckpointError: the file ends too early.
        """
        place, descriptor = self._places[name], self._file.fileno()
        columns = math.prod(place.spec.shape[1:])
        row_bytes = columns * place.spec.dtype.itemsize
        raw = torch.empty(rows * row_bytes, dtype=torch.uint8)
        start = position = place.start + first * row_bytes
        left = memoryview(raw.numpy())
        while left:
            done = os.preadv(descriptor, [left], position)
            if done == 0:
                raise CheckpointError(f"{self.path}: ends inside of {name}; download the file again")
            position, left = position + done, left[done:]
        os.posix_fadvise(descriptor, start, position - start, os.POSIX_FADV_DONTNEED)
        return raw.view(place.spec.dtype).reshape(rows, columns)

    def close(self) -> None:
        self._file.close()
