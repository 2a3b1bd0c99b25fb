"""Tables of Hugging Face `datasets`: parquet files, and the Arrow files of `save_to_disk`.

pyarrow reads both and is asked for only here. A parquet file can be read by row groups only, so the group of a
sample is read whole and the last few are kept: order samples by file, or write small row groups (about 100
rows with images), where that is too slow. Arrow files are mapped, so any row costs what it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.files import IndexedFiles, expand_paths
from megatron_vl.data.sources.index_file import FileIndex, Scan
from megatron_vl.data.sources.record import Record
from megatron_vl.data.sources.table_rows import COLUMNS, sample_of_row
from megatron_vl.errors import DataError

TABLE_KIND = "table-1"
SUFFIXES = (".parquet", ".arrow")
LARGEST_ROW_GROUP = 2 << 30
_KEPT_GROUPS = 2
_SAFE_VERSION = 15
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.(?:parquet|arrow)")


@dataclass(frozen=True)
class TableRow(Record):
    """One row. line: its number in the file, from 1. data: empty. row: values by column."""

    row: dict[str, Any] = field(default_factory=dict)

    def parse(self) -> Sample:
        return sample_of_row(self.row, self.default_id)

    def content(self) -> bytes:
        """Its values; those of images by their hash."""
        return json.dumps(self.row, default=_hash_or_text).encode()


def _hash_or_text(value: Any) -> str:
    """What JSON cannot spell: bytes, and types that `parse` refuses."""
    return hashlib.blake2b(value).hexdigest() if isinstance(value, bytes) else repr(value)


def import_pyarrow():
    """pyarrow. Raises DataError that says what to install: it is an optional dependency."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            "parquet and Arrow files need pyarrow, which is not installed: pip install 'pyarrow>=15'"
        ) from error
    if int(pyarrow.__version__.partition(".")[0]) < _SAFE_VERSION:
        # before 14.0.1 a file could name a Python class to be unpickled (CVE-2023-47248)
        raise DataError(
            f"pyarrow {pyarrow.__version__} is installed; parquet files need {_SAFE_VERSION} or newer: "
            f"pip install 'pyarrow>={_SAFE_VERSION}'"
        )
    return pyarrow


def table_files(paths: Sequence[str]) -> list[str]:
    """The files that `paths` name; a folder must hold one split. Raises DataError."""
    files: list[str] = []
    for path in map(os.fspath, paths):
        below = expand_paths([path], SUFFIXES, "parquet or Arrow")
        if os.path.isdir(path):
            below = [file for file in below if not os.path.basename(file).startswith("cache-")]
            names = [os.path.relpath(file, path) for file in below]
            splits = sorted({match.group(1) if (match := _SHARD.fullmatch(name)) else name for name in names})
            several = len(splits) > 1 and (
                len(splits) < len(names) or len({*map(os.path.dirname, names)}) > 1
            )
            looks_split = {re.split(r"[-_./]", os.path.basename(split))[0] for split in splits}
            if several or len(looks_split & {"train", "test", "validation", "valid", "val", "dev"}) > 1:
                raise DataError(
                    f"{path}: holds several splits or tables ({', '.join(splits[:6])}); name the files or the "
                    "folder of the one that is meant"
                )
        files += below
    if not files:
        raise DataError("no parquet or Arrow file is given; name at least one file or folder")
    return files


def scan_table(path: str) -> Scan:
    """Rows per row group, from the metadata alone. Raises DataError for a file that cannot be used."""
    with _Table(path) as table:
        rows = table.rows_per_group()
    if not sum(rows):
        raise DataError(f"{path}: a table without rows; remove it")
    return Scan(sum(rows), {"group_end": np.cumsum(np.array(rows, dtype=np.int64))})


class TableSource(IndexedFiles):
    """Rows of indexed parquet and Arrow files."""

    def __init__(self, files: Sequence[FileIndex]):
        super().__init__(files)
        self._tables: dict[int, _Table] = {}
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def _read(self, number: int, within: int) -> TableRow:
        file = self.files[number]
        ends = file.scan.arrays["group_end"]
        group = int(np.searchsorted(ends, within, side="right"))
        first = int(ends[group - 1]) if group else 0
        rows = self._groups.get((number, group))
        if rows is None:
            table = self._tables.get(number)
            if table is None:
                file.check_unchanged(self._handle(number).fileno())
                table = self._tables[number] = _Table(file.path)
            rows = self._groups[number, group] = table.read_group(group)
            if len(self._groups) > _KEPT_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end((number, group))
        return TableRow(file.path, within + 1, b"", rows.slice(within - first, 1).to_pylist()[0])

    def close(self) -> None:
        super().close()
        for table in self._tables.values():
            table.close()
        self._tables, self._groups = {}, OrderedDict()

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_tables": {}, "_groups": OrderedDict()}


class _Table:
    """One open file: groups of rows, read with the columns that a sample can use."""

    def __init__(self, path: str):
        pyarrow = import_pyarrow()
        self._path = path
        self._errors = (pyarrow.ArrowException, OSError, ValueError)
        self._parquet = self._map = None
        try:
            if path.lower().endswith(".parquet"):
                from pyarrow import parquet

                self._parquet = parquet.ParquetFile(path)
                names = self._parquet.schema_arrow.names
            else:
                self._map = pyarrow.memory_map(path)
                whole = _mapped_table(pyarrow, self._map)
                names = whole.schema.names
                self._batches = whole.to_batches()
        except self._errors as error:
            raise self._unreadable(error) from error
        self._columns = [name for name in names if name in COLUMNS]
        if not {"messages", "conversations", "text", "content"} & set(self._columns):
            raise DataError(
                f"{path}: none of the columns messages, conversations, text, content; has {', '.join(names[:12])}"
            )

    def rows_per_group(self) -> list[int]:
        if self._parquet is None:
            return [batch.num_rows for batch in self._batches]
        metadata = self._parquet.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        for number, group in enumerate(groups):
            if group.total_byte_size > LARGEST_ROW_GROUP:
                raise DataError(
                    f"{self._path}: row group {number} has {group.total_byte_size} bytes, more than "
                    f"{LARGEST_ROW_GROUP}; write it with smaller row groups (about 100 rows with images)"
                )
        return [group.num_rows for group in groups]

    def read_group(self, number: int):
        """A pyarrow table of the rows of one group."""
        try:
            if self._parquet is not None:
                return self._parquet.read_row_group(number, columns=self._columns, use_threads=False)
            return self._batches[number].select(self._columns)
        except self._errors as error:
            raise self._unreadable(error) from error

    def close(self) -> None:
        for file in (self._parquet, self._map):
            if file is not None:
                file.close()

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(
            f"{self._path}: not a readable table ({str(error)[:200]}); write or download it again"
        )


def _mapped_table(pyarrow: Any, file: Any) -> Any:
    """The table of a mapped Arrow file, as a stream (`save_to_disk`) or in the file format."""
    try:
        return pyarrow.ipc.open_stream(file).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(file).read_all()
