"""Building a length index: in parallel worker processes, resumable, with progress.

Samples are measured in chunks. Each finished chunk is a file of its own under `parts/`, so that a build that
was stopped goes on where it was. Image headers are read, pixels are not.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.batch import Row
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.lengths import (
    DESCRIPTION_FILE,
    LENGTHS_FILE,
    PARTS_FOLDER,
    PIECES_FILE,
    REASONS_FILE,
    LengthIndex,
    Source,
    digest_of,
    index_folder,
    made_from,
    open_index,
    wait_for_index,
)
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.turns import WHOLE, Piece, SplitRule
from megatron_vl.errors import DataError
from megatron_vl.plan.vision_share import CROP, GLOBAL

NO_LIMIT = 1 << 62  # of tokens: what is too long for a row is decided by the plan, not by the index
MOST_PARTS, LEAST_SAMPLES = 1000, 256
SECONDS_BETWEEN_LINES = 10.0

Measured = dict[
    str, np.ndarray
]  # lengths int32 [n, 3], reasons as text [n], with a split rule pieces int64 [n, 4]


def length_index(
    index_dir: str | os.PathLike,
    name: str,
    source: Source,
    data: DataConfig,
    model: ModelConfig,
    workers: int = 0,
    build: bool = True,
    say: Callable[[str], None] = lambda line: None,
    reading: str = "",
    chunk: int | None = None,
    split: SplitRule | None = None,
) -> LengthIndex:
    """The index of a domain: opened, or built (`build`, one process of the run), or waited for (the others).

    workers: processes that measure, 0 = this one. say: gets a line of progress now and then. reading: as in
    `made_from`. chunk: samples per part. split: how over-long conversations are cut, None = not at all. Raises
    DataError when an index is there that does not fit the data (`open_index`), when a worker dies, and for a folder
    that cannot be written.
    """
    if len(source) == 0:
        raise DataError(f"domain {name} is empty: its files hold no sample; correct its paths, or remove it")
    builder = index_builder(data, model)
    folder, description = index_folder(index_dir, name), made_from(source, builder, reading, split)
    index = open_index(folder, name, description)
    if index is not None:
        return index
    if not build:
        return wait_for_index(folder, name, description)
    try:
        return _build(folder, name, source, builder, description, workers, say, chunk, split)
    except BrokenProcessPool as error:
        raise DataError(
            f"domain {name}: a process that measured samples was killed, mostly for want of memory; what is "
            "done is kept, start again with a smaller data.packing.index_workers (0 = one process)"
        ) from error
    except OSError as error:
        raise DataError(f"{folder}: the length index cannot be written ({error})") from error


def index_builder(data: DataConfig, model: ModelConfig) -> RowBuilder:
    """A builder of rows of any length."""
    return RowBuilder(replace(data, seq_length=NO_LIMIT), model)


def measure(
    source: Source, builder: RowBuilder, start: int, stop: int, split: SplitRule | None = None
) -> Measured:
    """Lengths of the samples start ... stop - 1: tokens, global views, crops; and why they are refused.

    split: a sample that no row takes is measured piece by piece.
    """
    lengths, reasons, parts = [], [], []
    for number in range(start, stop):
        raw = source[number]
        for piece, row in _documents(builder, raw, split):
            reasons.append("" if row.refused is None else row.refused.reason)
            lengths.append(_cost(row))
            parts.append((number, piece.number, piece.first, piece.end))
    found = {"lengths": np.array(lengths, dtype=np.int32), "reasons": np.array(reasons, dtype=np.str_)}
    return found if split is None else {**found, "pieces": np.array(parts, dtype=np.int64)}


def _documents(builder: RowBuilder, raw: RawLine, split: SplitRule | None) -> list[tuple[Piece, Row]]:
    """The whole sample, or its pieces."""
    row, _ = builder.build(raw)
    if split is None or row.refused is not None or split.takes(np.array(_cost(row))):
        return [(WHOLE, row)]
    pieces = builder.pieces(raw, split)
    if len(pieces) == 1:
        return [(WHOLE, row)]
    return [(piece, builder.build(raw, piece)[0]) for piece in pieces]


def _cost(row: Row) -> tuple[int, int, int]:
    """Tokens, global views, crops."""
    return len(row.ids), row.view_kinds.count(GLOBAL), row.view_kinds.count(CROP)


def _build(
    folder: Path,
    name: str,
    source: Source,
    builder: RowBuilder,
    description: dict[str, Any],
    workers: int,
    say: Callable[[str], None],
    chunk: int | None,
    split: SplitRule | None,
) -> LengthIndex:
    chunk = chunk or max(LEAST_SAMPLES, -(-len(source) // MOST_PARTS))
    parts = _open_parts(folder, {"made_from": description, "chunk": chunk}, say)
    ranges = [(start, min(start + chunk, len(source))) for start in range(0, len(source), chunk)]
    missing = [r for r in ranges if not _part(parts, r).is_file()]
    done = sum(stop - start for start, stop in ranges) - sum(stop - start for start, stop in missing)
    progress = _Progress(name, len(source), done, say)
    for finished, found in _measured(source, builder, missing, workers, split):
        _write(_part(parts, finished), lambda file: np.savez(file, **found))
        progress.add(finished[1] - finished[0])
    _join(folder, parts, ranges, description)
    index = open_index(folder, name, description)
    assert index is not None, folder
    return index


def _measured(
    source: Source,
    builder: RowBuilder,
    ranges: list[tuple[int, int]],
    workers: int,
    split: SplitRule | None,
) -> Iterator[tuple[tuple[int, int], Measured]]:
    """(range, its lengths) in the order in which they get ready."""
    if workers == 0 or len(ranges) <= 1:
        yield from ((r, measure(source, builder, *r, split)) for r in ranges)
        return
    context = multiprocessing.get_context("spawn")
    first = (source, builder.data, builder.model, split)
    with ProcessPoolExecutor(min(workers, len(ranges)), context, _start_worker, first) as pool:
        running = {pool.submit(_measure_in_worker, r): r for r in ranges}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_in_worker: list[
    tuple[Source, RowBuilder, SplitRule | None]
] = []  # what a worker process has been given once


def _start_worker(source: Source, data: DataConfig, model: ModelConfig, split: SplitRule | None) -> None:
    _in_worker[:] = [(source, RowBuilder(data, model), split)]


def _measure_in_worker(samples: tuple[int, int]) -> Measured:
    source, builder, split = _in_worker[0]
    return measure(source, builder, *samples, split)


def _open_parts(folder: Path, task: dict[str, Any], say: Callable[[str], None]) -> Path:
    """The folder of finished chunks; those of another task (other data, other rules) are removed."""
    parts, note = folder / PARTS_FOLDER, folder / PARTS_FOLDER / "task.json"
    digest = digest_of(task)
    if parts.is_dir() and (not note.is_file() or note.read_text() != digest):
        say(f"{parts}: unfinished, and made from other data or rules; starting anew")
        shutil.rmtree(parts)
    parts.mkdir(parents=True, exist_ok=True)
    _write(note, lambda file: file.write(digest.encode()))
    return parts


def _part(parts: Path, samples: tuple[int, int]) -> Path:
    return parts / f"{samples[0]:012d}.npz"


def _join(folder: Path, parts: Path, ranges: list[tuple[int, int]], description: dict[str, Any]) -> None:
    """All parts as one index; the description, which makes it valid, is written last."""
    names, lengths, codes, pieces = [""], [], [], []
    for samples in ranges:
        path = _part(parts, samples)
        try:
            with np.load(path, allow_pickle=False) as part:
                lengths.append(part["lengths"])
                reasons = part["reasons"]
                pieces += [part["pieces"]] if "pieces" in part else []
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is damaged ({error}); remove it and start again") from error
        found, inverse = np.unique(reasons, return_inverse=True)
        names += [str(reason) for reason in found if str(reason) not in names]
        codes.append(np.array([names.index(str(reason)) for reason in found], dtype=np.uint8)[inverse])
    _write(folder / LENGTHS_FILE, lambda file: np.save(file, np.concatenate(lengths)))
    _write(folder / REASONS_FILE, lambda file: np.save(file, np.concatenate(codes)))
    (folder / PIECES_FILE).unlink(missing_ok=True)
    if pieces:
        _write(folder / PIECES_FILE, lambda file: np.save(file, np.concatenate(pieces)))
    record = {"made_from": description, "reasons": names}
    _write(folder / DESCRIPTION_FILE, lambda file: file.write(json.dumps(record, indent=1).encode()))
    shutil.rmtree(parts)


def _write(path: Path, content: Callable[[Any], object]) -> None:
    """Writes a file aside and renames it, so that it is complete or not there."""
    aside = path.with_name(path.name + ".writing")
    with open(aside, "wb") as file:
        content(file)
    os.replace(aside, path)


class _Progress:
    """Says how far a build is, at most every SECONDS_BETWEEN_LINES."""

    def __init__(self, name: str, total: int, done: int, say: Callable[[str], None]):
        self._name, self._total, self._done, self._say = name, total, done, say
        self._first, self._begin = done, time.monotonic()
        self._next = self._begin + SECONDS_BETWEEN_LINES
        if done:
            say(f"length index of {name}: {done:,} of {total:,} samples were measured before")

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now >= self._next or self._done == self._total:
            self._next = now + SECONDS_BETWEEN_LINES
            rate = (self._done - self._first) / max(now - self._begin, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            self._say(
                f"length index of {self._name}: {self._done:,} of {self._total:,} samples, {rate:,.0f} per "
                f"second, {left:,.0f} s left"
            )
