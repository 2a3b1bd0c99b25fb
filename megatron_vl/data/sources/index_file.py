"""The index of one data file: where its samples lie, what was refused, and which file it was made from.

Stored as one file: 8 bytes of magic, then (little-endian) the length of the header as u64, its CRC-32 as u32, the
header as JSON, and the arrays, each aligned to 64 bytes. The header holds the size and the modification time
(nanoseconds) of the data, the kind of index with its version, and a CRC-32 of every array. Arrays are mapped,
not read: processes of one machine share them, and a spawned worker is sent a path instead of gigabytes.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from megatron_vl.data.bad_samples import BadSample
from megatron_vl.errors import DataError

MOST_LISTED = 10_000
_MAGIC = b"MVLINDX1"
_PREFIX = struct.Struct("<8sQI")
_ALIGNMENT = 64
_LARGEST_HEADER = 1 << 28
_DTYPES = ("<i8", "<i4", "|u1")


class IndexUnusable(Exception):
    """A stored index cannot be used. why: the rest of a sentence. stale: it is whole, but the data are newer."""

    def __init__(self, why: str, stale: bool = False):
        super().__init__(why)
        self.why = why
        self.stale = stale


@dataclass
class Scan:
    """What one scan of a data file found.

    samples: number of good samples. arrays: int64, int32 or uint8, in the form that the source of this kind
    reads. ignored: what is neither a sample nor an error, e.g. members with an extension that nobody reads.
    """

    samples: int
    arrays: dict[str, np.ndarray]
    refused: list[BadSample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)

    def refuse(self, bad: BadSample) -> None:
        """Counts a refusal; the first MOST_LISTED are also kept in full."""
        self.counts[bad.reason] += 1
        if len(self.refused) < MOST_LISTED:
            self.refused.append(bad)


@dataclass(frozen=True)
class FileIndex:
    """A scan together with the identity of its file. kind: e.g. `tar-1`. stored_at: None = in memory only."""

    path: str
    kind: str
    size: int
    mtime_ns: int
    scan: Scan = field(repr=False)
    stored_at: str | None = None

    def check_unchanged(self, descriptor: int) -> None:
        """Raises DataError when the open file is not the one that was indexed."""
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(
                f"{self.path}: {status.st_size} bytes now, {self.size} when it was indexed, or written since; "
                "do not change data during a run (a new start indexes the file again)"
            )

    def __reduce__(self):
        if self.stored_at is None:
            return FileIndex, (self.path, self.kind, self.size, self.mtime_ns, self.scan)
        return _reopen, (self.stored_at, self.path, self.kind, self.size, self.mtime_ns)


def store(index: FileIndex, index_path: str) -> None:
    """Writes the index in one step: other processes see the old file or the whole new one. Raises DataError."""
    scan = index.scan
    placed, offset = {}, 0
    for name, array in scan.arrays.items():
        assert array.dtype.str in _DTYPES and array.ndim == 1, (name, array.dtype, array.shape)
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        placed[name] = [array.dtype.str, len(array), offset, zlib.crc32(np.ascontiguousarray(array))]
        offset += array.nbytes
    header = json.dumps(
        {
            "path": index.path,
            "kind": index.kind,
            "size": index.size,
            "mtime_ns": index.mtime_ns,
            "samples": scan.samples,
            "arrays": placed,
            "counts": scan.counts,
            "ignored": scan.ignored,
            "refused": [[bad.id, bad.line, bad.reason, bad.detail] for bad in scan.refused],
            "bytes": offset,
        }
    ).encode()
    temporary = f"{index_path}.{uuid.uuid4().hex}.tmp"  # several machines may write into one folder
    try:
        os.makedirs(os.path.dirname(index_path), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(_PREFIX.pack(_MAGIC, len(header), zlib.crc32(header)) + header)
            start = _data_start(len(header))
            for (_, _, offset, _), array in zip(placed.values(), scan.arrays.values()):
                file.seek(start + offset)
                file.write(np.ascontiguousarray(array).data)
            file.truncate(start + json.loads(header)["bytes"])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, index_path)
    except OSError as error:
        raise DataError(
            f"{index_path}: the index cannot be written ({error.strerror}); name a cache folder that can be"
        ) from error


def load(index_path: str, path: str, kind: str, size: int, mtime_ns: int, check: bool = True) -> FileIndex:
    """The stored index of the data file `path` of this size and modification time.

    check: compare the arrays with their CRC, about 1 GB/s. Raises IndexUnusable when there is none, it is
    damaged, of another kind or version, or made from other data.
    """
    try:
        with open(index_path, "rb") as file:
            header = _read_header(file.read(_PREFIX.size), file)
            total = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise IndexUnusable("is not there") from error
    except OSError as error:
        raise IndexUnusable(f"cannot be read ({error.strerror})") from error
    try:
        if header["kind"] != kind or header["path"] != path:
            raise IndexUnusable(f"is of kind {header['kind']} for {header['path']}, another version or file")
        if (header["size"], header["mtime_ns"]) != (size, mtime_ns):
            changed = (
                f"{header['size']} bytes then, {size} now" if header["size"] != size else "written since"
            )
            raise IndexUnusable(f"is older than its data ({changed})", stale=True)
        start = _data_start(header["header_bytes"])
        if total != start + header["bytes"]:
            raise IndexUnusable(f"has {total} bytes instead of {start + header['bytes']}")
        arrays = _map_arrays(index_path, header["arrays"], start, check)
        refused = [BadSample(one[0], path, one[1], one[2], one[3]) for one in header["refused"]]
        scan = Scan(header["samples"], arrays, refused, Counter(header["counts"]), Counter(header["ignored"]))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise IndexUnusable(f"is damaged ({type(error).__name__}: {error})") from error
    return FileIndex(path, kind, size, mtime_ns, scan, index_path)


def _reopen(index_path: str, path: str, kind: str, size: int, mtime_ns: int) -> FileIndex:
    """The index in a process to which it was sent; its arrays were checked where they were first loaded."""
    try:
        return load(index_path, path, kind, size, mtime_ns, check=False)
    except IndexUnusable as error:
        raise DataError(
            f"{index_path}: the index {error.why} any more; leave the cache folder alone during a run"
        ) from error


def _read_header(prefix: bytes, file) -> dict:
    if len(prefix) < _PREFIX.size:
        raise IndexUnusable(f"is damaged ({len(prefix)} bytes)")
    magic, length, crc = _PREFIX.unpack(prefix)
    if magic != _MAGIC or length > _LARGEST_HEADER:
        raise IndexUnusable(f"is no index of this version (it begins with {prefix[:8]!r})")
    text = file.read(length)
    if len(text) != length or zlib.crc32(text) != crc:
        raise IndexUnusable("is damaged (its header does not match its checksum)")
    return {**json.loads(text), "header_bytes": length}


def _map_arrays(index_path: str, placed: dict, start: int, check: bool) -> dict[str, np.ndarray]:
    whole = np.memmap(index_path, dtype=np.uint8, mode="r")
    arrays = {}
    for name, (dtype, count, offset, crc) in placed.items():
        if dtype not in _DTYPES:
            raise IndexUnusable(f"is damaged (array {name} of type {dtype})")
        begin = start + offset
        # .view() on an empty slice is refused by numpy when the offset is that of the end
        array = np.asarray(whole[begin : begin + count * np.dtype(dtype).itemsize]).view(dtype)
        if len(array) != count or (check and zlib.crc32(array) != crc):
            raise IndexUnusable(f"is damaged (array {name} does not match its checksum)")
        arrays[name] = array
    return arrays


def _data_start(header_bytes: int) -> int:
    return -(-(_PREFIX.size + header_bytes) // _ALIGNMENT) * _ALIGNMENT
