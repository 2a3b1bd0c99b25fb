"""Building a length index: in parallel worker processes, resumable, with progress.

Samples are measured in chunks. Each finished chunk is a file of its own under `parts/`, so that a build that
was stopped goes on where it was. Image headers are read, pixels are not. Runs that share a folder build one at a time
(`data/build_lock.py`); whoever waited finds the index finished.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.batch import Row
from megatron_vl.data.build_lock import BuildLock
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.lengths import (
    CONTENTS_FILE,
    DESCRIPTION_FILE,
    LENGTHS_FILE,
    PARTS_FOLDER,
    PIECES_FILE,
    REASONS_FILE,
    LengthIndex,
    Source,
    checksum,
    digest_of,
    index_folder,
    made_from,
    open_index,
    places_that_differ,
    wait_for_index,
)
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.turns import WHOLE, Piece, SplitRule
from megatron_vl.data.whole_file import write_whole
from megatron_vl.data.workers import end_with_parent
from megatron_vl.errors import DataError
from megatron_vl.plan.vision_share import CROP, GLOBAL

NO_LIMIT = 1 << 62  # of tokens: what is too long for a row is decided by the plan, not by the index
MOST_PARTS, LEAST_SAMPLES = 1000, 256
SECONDS_BETWEEN_LINES = 10.0
Result = TypeVar("Result")

COMPARED_IMAGES = 64  # documents with images that are measured again when data.data_root is another one


class Measured(NamedTuple):
    """Of n documents of s samples: lengths int32 [n, 3], reasons as text [n], checksums uint64 [s], images left out
    as text; with a split rule pieces int64 [n, 4].
    """

    lengths: np.ndarray
    reasons: np.ndarray
    contents: np.ndarray
    left_out: np.ndarray
    pieces: np.ndarray | None = None


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
    if index is None and not build:
        return wait_for_index(folder, name, description)
    try:
        if index is None:
            with BuildLock(folder, say) as lock:
                index = open_index(folder, name, description)  # made meanwhile by whom we waited for
                if index is None:
                    return _build(
                        folder, name, source, builder, description, workers, say, chunk, lock, split
                    )
        if build:
            _compare_if_moved(index, source, builder, description, workers, say)
        return index
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
    lengths, reasons, parts, left_out = [], [], [], []
    contents = np.zeros(stop - start, dtype=np.uint64)
    for number in range(start, stop):
        raw = source[number]
        contents[number - start] = checksum(raw)
        for piece, row in _documents(builder, raw, split):
            reasons.append("" if row.refused is None else row.refused.reason)
            lengths.append(_cost(row))
            parts.append((number, piece.number, piece.first, piece.end))
            left_out += row.left_out
    return Measured(
        np.array(lengths, dtype=np.int32),
        np.array(reasons, dtype=np.str_),
        contents,
        np.array(left_out, dtype=np.str_),
        None if split is None else np.array(parts, dtype=np.int64),
    )


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


def checksums(source: Source, builder: RowBuilder, start: int, stop: int) -> np.ndarray:
    """Of the samples start ... stop - 1 as they are now, uint64."""
    return np.array([checksum(source[number]) for number in range(start, stop)], dtype=np.uint64)


def _compare_if_moved(
    index: LengthIndex,
    source: Source,
    builder: RowBuilder,
    description: dict[str, Any],
    workers: int,
    say: Callable[[str], None],
) -> None:
    """Compares every record with its checksum where a path or time is another one than when the index was made.

    Raises DataError for the first sample that differs. Otherwise the index takes note of the new places.
    """
    assert index.folder is not None and index.contents is not None
    moved = places_that_differ(index.folder, description)
    if not moved:
        return
    say(f"domain {index.name}: {moved[0]}; comparing its contents with its length index")
    ranges = _ranges(len(source), max(LEAST_SAMPLES, -(-len(source) // MOST_PARTS)))
    progress = _Progress(index.name, len(source), 0, say, "comparing domain")
    for (start, stop), found in _over(checksums, source, builder, ranges, workers):
        differ = np.flatnonzero(index.contents[start:stop] != found)
        if len(differ):
            raw = source[start + int(differ[0])]
            raise DataError(
                f"the length index of domain {index.name} does not belong to the data any more: sample "
                f"{start + int(differ[0])} ({raw.source}:{raw.line}) has changed; a run that began with it must get "
                f"those data back; otherwise remove {index.folder} to have it built anew"
            )
        progress.add(stop - start)
    _compare_images(index, source, builder)
    path = index.folder / DESCRIPTION_FILE
    record = {**json.loads(path.read_text(encoding="utf-8")), "made_from": description}
    try:
        write_whole(path, lambda file: file.write(json.dumps(record, indent=1).encode()))
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror}): the contents will be compared at every start")


def _compare_images(index: LengthIndex, source: Source, builder: RowBuilder) -> None:
    """Measures some documents with images again: with a wrong data.data_root all images would be refused later."""
    with_images = np.flatnonzero(index.globals_)
    chosen = with_images[
        np.linspace(0, len(with_images) - 1, min(COMPARED_IMAGES, len(with_images))).astype(int)
    ]
    for number in map(int, chosen):
        sample, piece = index.part(number)
        row, _ = builder.build(source[sample], piece)
        now = _cost(row)
        then = tuple(int(values[number]) for values in (index.tokens, index.globals_, index.crops))
        if then != now:
            reason = "good" if row.refused is None else row.refused.reason
            raise DataError(
                f"sample {piece.name(str(sample))} of domain {index.name} has {now[0]} tokens, {now[1]} global views "
                f"and {now[2]} crops ({reason}), but {then[0]}, {then[1]} and {then[2]} in its length index: its "
                f"images are not those of then; correct data.data_root, or remove {index.folder}"
            )


def _build(
    folder: Path,
    name: str,
    source: Source,
    builder: RowBuilder,
    description: dict[str, Any],
    workers: int,
    say: Callable[[str], None],
    chunk: int | None,
    lock: BuildLock,
    split: SplitRule | None,
) -> LengthIndex:
    chunk = chunk or max(LEAST_SAMPLES, -(-len(source) // MOST_PARTS))
    parts = _open_parts(folder, {"made_from": description, "chunk": chunk}, say)
    ranges = _ranges(len(source), chunk)
    missing = [r for r in ranges if not _part(parts, r).is_file()]
    done = sum(stop - start for start, stop in ranges) - sum(stop - start for start, stop in missing)
    progress = _Progress(name, len(source), done, say)
    for finished, measured in _over(partial(measure, split=split), source, builder, missing, workers):
        lock.check()
        _save_part(_part(parts, finished), measured)
        progress.add(finished[1] - finished[0])
    lock.check()
    _join(folder, parts, ranges, description)
    index = open_index(folder, name, description)
    assert index is not None, folder
    return index


def _ranges(count: int, chunk: int) -> list[tuple[int, int]]:
    return [(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def _over(
    work: Callable[[Source, RowBuilder, int, int], Result],
    source: Source,
    builder: RowBuilder,
    ranges: list[tuple[int, int]],
    workers: int,
) -> Iterator[tuple[tuple[int, int], Result]]:
    """(range, what `work` makes of it) in the order in which they get ready."""
    if workers == 0 or len(ranges) <= 1:
        yield from ((r, work(source, builder, *r)) for r in ranges)
        return
    context = multiprocessing.get_context("spawn")
    first = (source, builder.data, builder.model)
    with ProcessPoolExecutor(min(workers, len(ranges)), context, _start_worker, first) as pool:
        running = {pool.submit(_work_in_worker, work, r): r for r in ranges}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_in_worker: list[tuple[Source, RowBuilder]] = []  # what a worker process has been given once


def _start_worker(source: Source, data: DataConfig, model: ModelConfig) -> None:
    end_with_parent()
    _in_worker[:] = [(source, RowBuilder(data, model))]


def _work_in_worker(
    work: Callable[[Source, RowBuilder, int, int], Result], samples: tuple[int, int]
) -> Result:
    source, builder = _in_worker[0]
    return work(source, builder, *samples)


def _open_parts(folder: Path, task: dict[str, Any], say: Callable[[str], None]) -> Path:
    """The folder of finished chunks; those of another task (other data, other rules) are removed."""
    parts, note = folder / PARTS_FOLDER, folder / PARTS_FOLDER / "task.json"
    digest = digest_of(task)
    if parts.is_dir() and (not note.is_file() or note.read_text() != digest):
        say(f"{parts}: unfinished, and made from other data or rules; starting anew")
        shutil.rmtree(parts)
    parts.mkdir(parents=True, exist_ok=True)
    write_whole(note, lambda file: file.write(digest.encode()))
    return parts


def _part(parts: Path, samples: tuple[int, int]) -> Path:
    return parts / f"{samples[0]:012d}.npz"


def _save_part(path: Path, measured: Measured) -> None:
    arrays = {name: array for name, array in measured._asdict().items() if array is not None}
    write_whole(path, lambda file: np.savez(file, **arrays))


def _load_part(path: Path) -> Measured:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Measured(**stored)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and start again") from error


def _join(folder: Path, parts: Path, ranges: list[tuple[int, int]], description: dict[str, Any]) -> None:
    """All parts as one index; the description, which makes it valid, is written last."""
    names, lengths, codes, contents, left_out, pieces = [""], [], [], [], Counter(), []
    for samples in ranges:
        part = _load_part(_part(parts, samples))
        lengths.append(part.lengths)
        contents.append(part.contents)
        left_out.update(part.left_out.tolist())
        pieces += [] if part.pieces is None else [part.pieces]
        found, inverse = np.unique(part.reasons, return_inverse=True)
        names += [str(reason) for reason in found if str(reason) not in names]
        codes.append(np.array([names.index(str(reason)) for reason in found], dtype=np.uint8)[inverse])
    whole = np.concatenate(contents)
    write_whole(folder / LENGTHS_FILE, lambda file: np.save(file, np.concatenate(lengths)))
    write_whole(folder / REASONS_FILE, lambda file: np.save(file, np.concatenate(codes)))
    write_whole(folder / CONTENTS_FILE, lambda file: np.save(file, whole))
    (folder / PIECES_FILE).unlink(missing_ok=True)
    if pieces:
        write_whole(folder / PIECES_FILE, lambda file: np.save(file, np.concatenate(pieces)))
    record = {
        "made_from": description,
        "reasons": names,
        "contents": hashlib.sha256(whole.astype("<u8").tobytes()).hexdigest(),
        "left_out": dict(left_out.most_common()),
    }
    write_whole(folder / DESCRIPTION_FILE, lambda file: file.write(json.dumps(record, indent=1).encode()))
    shutil.rmtree(parts)


class _Progress:
    """Says how far a build is, at most every SECONDS_BETWEEN_LINES."""

    def __init__(
        self, name: str, total: int, done: int, say: Callable[[str], None], what: str = "length index of"
    ):
        self._name, self._total, self._done, self._say = f"{what} {name}", total, done, say
        self._first, self._begin = done, time.monotonic()
        self._next = self._begin + SECONDS_BETWEEN_LINES
        if done:
            say(f"{self._name}: {done:,} of {total:,} samples were measured before")

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now >= self._next or self._done == self._total:
            self._next = now + SECONDS_BETWEEN_LINES
            rate = (self._done - self._first) / max(now - self._begin, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            self._say(
                f"{self._name}: {self._done:,} of {self._total:,} samples, {rate:,.0f} per "
                f"second, {left:,.0f} s left"
            )
