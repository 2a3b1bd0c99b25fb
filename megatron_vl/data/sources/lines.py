"""JSONL files through a stored index: conversations, ShareGPT conversations and GUI trajectories.

`data/jsonl.JsonlSource` finds the lines anew at every start and sends all offsets to every worker; here both
are stored once and mapped. The lines and their numbers are the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.jsonl import _scan as scan_jsonl
from megatron_vl.data.sources.files import IndexedFiles
from megatron_vl.data.sources.gui import ActionSchema, GuiLine
from megatron_vl.data.sources.index_file import FileIndex, Scan
from megatron_vl.data.sources.record import ConversationLine, Record
from megatron_vl.data.sources.sharegpt import ShareGptLine
from megatron_vl.errors import DataError

LINES_KIND = "lines-1"
LARGEST_LINE_BYTES = 256 << 20
LINE_FORMATS = ("jsonl", "sharegpt", "gui")


def scan_lines(path: str) -> Scan:
    """Offsets and lengths of the lines that are not blank. Raises DataError for a file without any.

    A line of more than LARGEST_LINE_BYTES is refused here, before anybody would have to hold it in memory.
    """
    found = scan_jsonl(path)
    fits = found.lengths <= LARGEST_LINE_BYTES
    if not fits.any():
        raise DataError(f"{path}: every line has more than {LARGEST_LINE_BYTES} bytes; is it a JSONL file?")
    arrays = {"start": found.starts, "length": found.lengths, "line": found.line_numbers}
    scan = Scan(int(fits.sum()), {name: array[fits].astype("<i8") for name, array in arrays.items()})
    for line, length in zip(found.line_numbers[~fits], found.lengths[~fits]):
        detail = f"a line of {length} bytes, the limit is {LARGEST_LINE_BYTES}"
        name = f"{os.path.basename(path)}:{line}"
        scan.refuse(BadSample(name, path, int(line), "text_too_large", detail))
    return scan


class LineSource(IndexedFiles):
    """Lines of indexed JSONL files. form: one of LINE_FORMATS. schema: the actions, for `gui` only."""

    def __init__(self, files: Sequence[FileIndex], form: str = "jsonl", schema: ActionSchema | None = None):
        assert form in LINE_FORMATS and (schema is not None) == (form == "gui"), (form, schema)
        super().__init__(files)
        self.form = form
        self.schema = schema

    def _read(self, number: int, within: int) -> Record:
        file = self.files[number]
        arrays = file.scan.arrays
        data = self._bytes_at(number, int(arrays["start"][within]), int(arrays["length"][within]))
        line = int(arrays["line"][within])
        if self.schema is not None:
            return GuiLine(file.path, line, data, self.schema)
        return (ShareGptLine if self.form == "sharegpt" else ConversationLine)(file.path, line, data)
