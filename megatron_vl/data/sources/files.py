"""What the sources of all formats share: paths in, files of known content, one list of samples out."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import BinaryIO

from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.sources.index_file import FileIndex
from megatron_vl.data.sources.record import Record
from megatron_vl.errors import DataError

MOST_OPEN_FILES = 64  # per process: a thousand shards in a dozen workers would exceed the usual limit


class IndexedFiles:
    """Several indexed files in the given order, addressed as one list of samples.

    Subclasses say in `_read` how one sample of one file is read.
    """

    def __init__(self, files: Sequence[FileIndex]):
        self.files = list(files)
        self._first_index = [0]
        for file in self.files:
            self._first_index.append(self._first_index[-1] + file.scan.samples)
        self._handles: OrderedDict[int, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return self._first_index[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._first_index, index) - 1
        return self._read(number, index - self._first_index[number])

    def _read(self, number: int, within: int) -> Record:
        raise NotImplementedError(type(self).__name__)

    def describe(self) -> list[dict[str, int | str]]:
        """Path, bytes and number of samples per file: what must not change before a run is resumed."""
        return [{"path": file.path, "bytes": file.size, "samples": file.scan.samples} for file in self.files]

    def refused(self) -> list[BadSample]:
        """What was refused while indexing; see `record.Source`."""
        return [bad for file in self.files for bad in file.scan.refused]

    def refused_counts(self) -> dict[str, int]:
        """All refusals of the indexing by reason."""
        return dict(sum((file.scan.counts for file in self.files), Counter()))

    def ignored_counts(self) -> dict[str, int]:
        """What indexing passed over because no sample needs it, by kind."""
        return dict(sum((file.scan.ignored for file in self.files), Counter()))

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles = OrderedDict()

    def _bytes_at(self, number: int, offset: int, length: int) -> bytes:
        """A piece of a file. Raises DataError when the file changed since it was indexed."""
        handle = self._handle(number)
        self.files[number].check_unchanged(handle.fileno())
        data = os.pread(handle.fileno(), length, offset)
        while len(data) < length and (
            more := os.pread(handle.fileno(), length - len(data), offset + len(data))
        ):
            data += more  # one call reads at most 2 GiB
        if len(data) != length:
            raise DataError(f"{self.files[number].path}: bytes {offset} to {offset + length} cannot be read")
        return data

    def _handle(self, number: int) -> BinaryIO:
        """The open file; not yet compared with its index."""
        handle = self._handles.get(number)
        if handle is None:
            file = self.files[number]
            try:
                # Kept open for the next sample: opening is what costs on network file systems.
                handle = open(file.path, "rb", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise DataError(
                    f"{file.path}: cannot be opened any more ({error.strerror}); do not move data during a run"
                ) from error
            self._handles[number] = handle
            if len(self._handles) > MOST_OPEN_FILES:
                self._handles.popitem(last=False)[1].close()
        self._handles.move_to_end(number)
        return handle

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": OrderedDict()}


def expand_paths(paths: Sequence[str], suffixes: tuple[str, ...], what: str) -> list[str]:
    """The files that `paths` name: files as they are, folders as all files below with one of the suffixes.

    Sorted within a folder, so that the order of samples is the same everywhere. what: the format, for errors.
    Raises DataError for a path that is missing or no regular file, and for a folder without such a file.
    """
    if not paths:
        raise DataError(f"no {what} file is given; name at least one file or folder")
    files: list[str] = []
    for path in map(os.fspath, paths):
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            below = files_below(path, suffixes)
            if not below:
                raise DataError(
                    f"{path}: no {what} file below this folder; one must end in {' or '.join(suffixes)}"
                )
            files += below
        elif stat.S_ISREG(mode):
            files.append(path)
        else:
            raise DataError(f"{path}: neither a file nor a folder; name a regular file")
    return files


def files_below(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files of a folder and its subfolders by suffix (any case), sorted. Linked folders are not entered."""
    found = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        found += [os.path.join(place, name) for name in sorted(names) if name.lower().endswith(suffixes)]
    return sorted(found)


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read ({why}); correct the path") from error
