"""The files of one checkpoint: torch's distributed-checkpoint format, read and written tensor by tensor.

A folder holds ``__R_N.distcp`` (rectangles of tensors, each as ``torch.save`` writes it), torch's index
``.metadata``, the two small files by which ``megatron.core.dist_checkpointing`` knows the format ``torch_dist``, and
ours: ``state.json``, ``config.yaml`` and ``manifest.json`` with the size and sha256 of every other file.

Keys are ``model/<released name>`` and ``optimizer/<what>/<released name>``; a stored tensor is a matrix, the released
one flattened behind its first axis. Nothing here communicates: the trainer's ranks write one part each, the
converter writes everything in one process. torch's own ``FileSystemWriter`` is not used, because it keeps every
tensor of a file alive until the file is complete and loses the errors of its threads (torch 2.13).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Pair = tuple[int, int]
INDEX, MANIFEST, STATE, CONFIG = ".metadata", "manifest.json", "state.json", "config.yaml"
MEGATRON = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip


def matrix_shape(shape: Sequence[int]) -> Pair:
    """How a released tensor is stored: flattened behind its first axis; ``[n]`` as ``[n, 1]``."""
    rows = shape[0] if len(shape) else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return rows, columns


@dataclass(frozen=True)
class Item:
    """One rectangle to write. shape: of the whole matrix; offset, size: of this part; resolve: gives its values,
    called when it is written, so that only one tensor per thread is in memory."""

    key: str
    shape: Pair
    dtype: torch.dtype
    offset: Pair
    size: Pair
    resolve: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.size[0] * self.size[1] * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """Where a written rectangle lies. dtype: without ``torch.``."""

    key: str
    shape: Pair
    dtype: str
    offset: Pair
    size: Pair
    file: str
    start: int
    length: int


@dataclass
class Written:
    """What one writer has written. files: name -> (bytes, sha256)."""

    entries: list[Entry] = field(default_factory=list)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)


class Digesting:
    """A binary file under ``torch.save`` that computes the sha256 of what is written.

    failed: the first error of the disk; ``torch.save`` may hide it behind one of its own.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._sha, self._size = path.open("xb", buffering=0), hashlib.sha256(), 0
        self.failed: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        self._sha.update(view)
        try:
            self._put(view)
        except OSError as error:
            self.failed = self.failed or error
            raise
        self._size += len(view)
        return len(view)

    def _put(self, view: memoryview) -> None:
        done = 0
        while done < len(view):  # a raw file may take less than it is given: 2 GiB at most on Linux
            done += self._file.write(view[done:])

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> tuple[int, str]:
        """To the disk and closed; (bytes, sha256)."""
        os.fsync(self._file.fileno())
        self._file.close()
        return self._size, self._sha.hexdigest()

    def close(self) -> None:
        self._file.close()


def write(
    folder: Path,
    items: Sequence[Item],
    prefix: str = "__0_",
    threads: int = 1,
    on_item: Callable[[Item], None] | None = None,
) -> Written:
    """Write the items to ``threads`` files ``<prefix>N.distcp`` of the folder and fsync them.

    on_item: called after each item, from the writing thread.

    Raises:
        OSError: the disk is full, the folder is not writable, a file is there already.
    """
    bins: list[list[Item]] = [[] for _ in range(max(1, threads))]
    loads = [0] * len(bins)
    for item in sorted(items, key=lambda i: -i.nbytes):
        target = loads.index(min(loads))
        bins[target].append(item)
        loads[target] += item.nbytes
    order = {id(item): number for number, item in enumerate(items)}
    parts = [sorted(part, key=lambda i: order[id(i)]) for part in bins if part]
    jobs = [(folder, f"{prefix}{number}.distcp", part, on_item) for number, part in enumerate(parts)]
    if len(jobs) <= 1:  # in this thread: one that hangs may then be left behind at the end of the process
        done = [_write_file(*job) for job in jobs]
    else:
        with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
            done = list(pool.map(_write_file, *zip(*jobs)))
    written = Written()
    for entries, name, size in done:
        written.entries += entries
        written.files[name] = size
    return written


def _write_file(
    folder: Path, name: str, items: Sequence[Item], on_item: Callable[[Item], None] | None
) -> tuple[list[Entry], str, tuple[int, str]]:
    stream, entries = Digesting(folder / name), []
    try:
        for item in items:
            start = stream.tell()
            values = item.resolve().detach().reshape(item.size)
            assert values.dtype == item.dtype, f"{item.key}: {values.dtype}, announced as {item.dtype}"
            values = values.cpu().contiguous()
            if values.untyped_storage().nbytes() != values.nbytes:
                values = values.clone()  # torch.save writes the whole storage of a view
            torch.save(values, stream)
            del values
            dtype = str(item.dtype).removeprefix("torch.")
            where = (name, start, stream.tell() - start)
            entries.append(Entry(item.key, item.shape, dtype, item.offset, item.size, *where))
            if on_item is not None:
                on_item(item)
        return entries, name, stream.finish()
    except RuntimeError as error:
        if stream.failed is not None:
            raise stream.failed from error
        raise
    finally:
        stream.close()


def publish(
    aside: Path, final: Path, written: Sequence[Written], state: dict[str, Any], config_yaml: str
) -> None:
    """Complete the folder ``aside`` with its small files and rename it to ``final``, which appears whole or not.

    Raises:
        ValueError: the parts do not tile their tensors exactly.
        OSError: as in `write`.
    """
    entries = [entry for part in written for entry in part.entries]
    files = {name: size for part in written for name, size in part.files.items()}
    index = _index(entries)
    small: dict[str, bytes] = {
        INDEX: pickle.dumps(index),
        "metadata.json": json.dumps(MEGATRON).encode(),
        STATE: (json.dumps(state, indent=1) + "\n").encode(),
        CONFIG: config_yaml.encode(),
    }
    for name, content in small.items():
        files[name] = _write_small(aside / name, content)
    common = Digesting(aside / "common.pt")
    try:
        torch.save({}, common)  # Megatron-Core wants one; what it would hold is in state.json
        files["common.pt"] = common.finish()
    finally:
        common.close()
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    _write_small(aside / MANIFEST, (json.dumps({"files": listed}, indent=1) + "\n").encode())
    sync_folder(aside)
    if final.exists():  # of the same step: damaged, or of a run that was rolled back
        replaced = final.with_name(final.name + ".old")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(aside, final)
    sync_folder(final.parent)


def _write_small(path: Path, content: bytes) -> tuple[int, str]:
    stream = Digesting(path)
    try:
        stream.write(content)
        return stream.finish()
    finally:
        stream.close()


def sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _index(entries: Sequence[Entry]) -> Metadata:
    """torch's index over all rectangles.

    Raises:
        ValueError: two writers disagree about a tensor, or its rectangles do not add up to it.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for entry in sorted(entries, key=lambda e: (e.key, e.offset)):
        dtype = getattr(torch, entry.dtype)
        known = tensors.setdefault(
            entry.key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry.shape), [])
        )
        if tuple(known.size) != tuple(entry.shape) or known.properties.dtype != dtype:
            raise ValueError(
                f"{entry.key} is {tuple(known.size)} {known.properties.dtype} and {entry.shape} {dtype}"
            )
        where = MetadataIndex(entry.key, torch.Size(entry.offset))
        if where in storage:
            raise ValueError(f"{entry.key}: two parts at {entry.offset}")
        known.chunks.append(ChunkStorageMetadata(torch.Size(entry.offset), torch.Size(entry.size)))
        storage[where] = _StorageInfo(entry.file, entry.start, entry.length)
    for key, tensor in tensors.items():
        covered = sum(c.sizes[0] * c.sizes[1] for c in tensor.chunks)
        if covered != tensor.size[0] * tensor.size[1]:
            raise ValueError(f"{key}: its parts have {covered} of {tensor.size.numel()} values")
    return Metadata(state_dict_metadata=tensors, storage_data=storage)
