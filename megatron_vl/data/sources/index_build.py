"""Indexes of many files: loaded where they are stored and still true, made where not, several at a time.

Every finished file is stored at once, so a build that was interrupted goes on with the files that are left.
Several ranks may build the same indexes at the same time: they may do the work twice, but nobody reads half
a file. To do it once, build before the run, or on one rank while the others wait.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from megatron_vl.data.sources.index_file import FileIndex, IndexUnusable, Scan, load, store
from megatron_vl.data.workers import end_with_parent
from megatron_vl.errors import ConfigError, DataError

IF_STALE = ("rebuild", "refuse")
Say = Callable[[str], None]
_SECONDS_BETWEEN_LINES = 5.0


def say_on_stderr(line: str) -> None:
    """The default place for what an index build has to say."""
    print(line, file=sys.stderr, flush=True)


def index_files(
    paths: Sequence[str],
    scan: Callable[[str], Scan],
    kind: str,
    cache_dir: str | None,
    workers: int = 1,
    if_stale: str = "rebuild",
    say: Say = say_on_stderr,
) -> list[FileIndex]:
    """The index of every file, in the order of `paths`.

    scan: a module-level function, since it is sent to spawned processes. kind: its name and version, e.g.
    `tar-1`; an index of another version is made anew. cache_dir: folder of the stored indexes; None = keep
    them in memory and make them at every start. workers: processes; 1 = in this one. if_stale: what to do
    with an index that is older than its data: `rebuild` says so and makes it anew, `refuse` is an error. say:
    takes lines about progress and about indexes that are made anew.
    Raises DataError with one line per file that cannot be indexed (the others are stored all the same).
    """
    if if_stale not in IF_STALE:
        raise ConfigError(f"if_stale = {if_stale}: must be one of {', '.join(IF_STALE)}")
    if workers < 1:
        raise ConfigError(f"workers = {workers}: at least one process must build the indexes; use 1")
    paths = [os.path.abspath(path) for path in paths]
    found: dict[str, FileIndex] = {}
    todo: dict[str, str | None] = {}
    for path in dict.fromkeys(paths):
        stored_at = None if cache_dir is None else index_path(path, kind, cache_dir)
        index = None if stored_at is None else _stored(stored_at, path, kind, if_stale, say)
        if index is None:
            todo[path] = stored_at
        else:
            found[path] = index
    found.update(_build(todo, scan, kind, workers, say))
    return [found[path] for path in paths]


def index_path(path: str, kind: str, cache_dir: str) -> str:
    """Where the index of a file is stored: its name for the reader, a hash of its whole path for safety."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(path))[:80]
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return os.path.join(os.path.abspath(cache_dir), f"{name}.{digest}.{kind.partition('-')[0]}.index")


def _stored(stored_at: str, path: str, kind: str, if_stale: str, say: Say) -> FileIndex | None:
    """The stored index, None when one must be made."""
    size, mtime_ns = _identity(path)
    try:
        return load(stored_at, path, kind, size, mtime_ns)
    except IndexUnusable as unusable:
        if unusable.stale and if_stale == "refuse":
            raise DataError(
                f"{path}: its index {stored_at} {unusable.why}, and if_stale = refuse; restore the data, or "
                "remove the index to accept them as they are"
            ) from unusable
        if os.path.lexists(stored_at):
            say(f"index {stored_at} {unusable.why}; making it anew")
        return None


def _build(
    todo: dict[str, str | None], scan: Callable[[str], Scan], kind: str, workers: int, say: Say
) -> dict[str, FileIndex]:
    """Makes the missing indexes. One bad file does not keep the others from being stored."""
    built, errors = {}, []
    progress = _Progress({path: _identity(path)[0] for path in todo}, say)
    for path, result in _results(todo, scan, kind, workers):
        if isinstance(result, DataError):
            errors.append(str(result))
        else:
            built[path] = result
        progress.finished(path)
    if errors:
        more = f"\n... and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise DataError("\n".join(sorted(errors)[:20]) + more)
    return built


def _results(
    todo: dict[str, str | None], scan: Callable[[str], Scan], kind: str, workers: int
) -> Iterator[tuple[str, FileIndex | DataError]]:
    workers = min(workers, len(todo))
    if workers <= 1:
        for path, stored_at in todo.items():
            yield path, _index_one(scan, path, kind, stored_at)
        return
    # spawn: forking a process that holds threads (torch, tokenizers) can hang its child
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        tasks = {
            pool.submit(_index_one, scan, path, kind, stored_at): path for path, stored_at in todo.items()
        }
        try:
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that builds indexes was ended, mostly for want of memory; what is finished is kept: "
                "start again, with fewer workers"
            ) from error


def _index_one(scan: Callable[[str], Scan], path: str, kind: str, stored_at: str | None):
    """A FileIndex, or the DataError that says why there is none."""
    try:
        before = _identity(path)
        index = _made_meanwhile(stored_at, path, kind, before)
        if index is not None:
            return index
        found = scan(path)
        if _identity(path) != before:
            raise DataError(f"{path}: changed while it was indexed; wait until it is written")
        if stored_at is None:
            return FileIndex(path, kind, *before, found)
        # not replaced when another rank was faster: on network file systems that would take the file away
        # from under its readers
        if _made_meanwhile(stored_at, path, kind, before) is None:
            store(FileIndex(path, kind, *before, found), stored_at)
        return load(stored_at, path, kind, *before, check=False)
    except OSError as error:
        return DataError(f"{path}: cannot be read ({error.strerror or error}); correct the path")
    except IndexUnusable as error:
        return DataError(
            f"{stored_at}: the index just written {error.why}; check the disk of the cache folder"
        )
    except DataError as error:
        return error


def _made_meanwhile(
    stored_at: str | None, path: str, kind: str, identity: tuple[int, int]
) -> FileIndex | None:
    """The index that another process has stored since we looked, if it did."""
    try:
        return None if stored_at is None else load(stored_at, path, kind, *identity)
    except IndexUnusable:
        return None


def _identity(path: str) -> tuple[int, int]:
    """(bytes, modification time in ns) of a file; (-1, 0) when it cannot be reached, which scanning reports."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


class _Progress:
    """Says every few seconds how far the build is, and once at its end when it took that long."""

    def __init__(self, sizes: dict[str, int], say: Say):
        self._sizes = {path: max(0, size) for path, size in sizes.items()}
        self._say = say
        self._files = self._bytes = 0
        self._begin = self._last = time.monotonic()

    def finished(self, path: str) -> None:
        self._files += 1
        self._bytes += self._sizes[path]
        now = time.monotonic()
        last_one = self._files == len(self._sizes)
        if now - self._last < _SECONDS_BETWEEN_LINES and not last_one:
            return
        self._last = now
        total, seconds = sum(self._sizes.values()), now - self._begin
        self._say(
            f"indexed {self._files} of {len(self._sizes)} files, {self._bytes / 1e9:.2f} of {total / 1e9:.2f} GB, "
            f"{seconds:.1f} s"
        )
