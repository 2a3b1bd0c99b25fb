"""The record of samples that were refused: `bad_samples.jsonl` in the run folder, and counts per reason."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from megatron_vl.errors import DataError


@dataclass(frozen=True)
class BadSample:
    """One refused sample: where it stands and why.

    id: the sample's own id, or `file.jsonl:LINE` when it has none. source: the JSONL file. line: from 1.
    reason: short code under which it is counted. detail: the sentence for the reader, with the values.
    """

    id: str
    source: str
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.id} ({self.source}:{self.line}): {self.reason}: {self.detail}"


class SampleRefused(DataError):
    """One sample is not usable. reason: short code. detail: the sentence. sample_id: None when not known."""

    def __init__(self, reason: str, detail: str, sample_id: str | None = None):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.sample_id = sample_id


class BadSampleLog:
    """Writes every bad sample once, also over epochs and over resumed runs.

    A sample is identified by its source and line, since ids may repeat, and by its id, since a line may make several
    documents. Only the rank that is given
    `write=True` touches the file; the others only count what they are shown. An existing file is read first,
    so that a resumed run neither repeats nor forgets records.
    """

    def __init__(self, path: str, write: bool):
        self.path = path
        self.write = write
        self._seen: set[tuple[str, int, str]] = set()
        self.by_reason: Counter[str] = Counter()
        self.by_source: Counter[str] = Counter()
        if write and os.path.exists(path):
            self._read_existing()

    @property
    def total(self) -> int:
        return len(self._seen)

    def add(self, records: Iterable[BadSample]) -> list[BadSample]:
        """Counts and writes the records that are new, and returns them."""
        new = [record for record in records if self._count(record)]
        if new and self.write:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in new)
        return new

    def summary(self) -> str:
        """One line for the console, e.g. `3 bad samples: truncated 2, too_long 1`."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.by_reason.most_common())
        return f"{self.total} bad sample{'' if self.total == 1 else 's'}" + (
            f": {reasons}" if reasons else ""
        )

    def _count(self, record: BadSample) -> bool:
        key = (record.source, record.line, record.id)
        if key in self._seen:
            return False
        self._seen.add(key)
        self.by_reason[record.reason] += 1
        self.by_source[record.source] += 1
        return True

    def _read_existing(self) -> None:
        """Takes over the records of an earlier start; a last line that was cut off by a kill is removed."""
        with open(self.path, "rb") as file:
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(complete))
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                self._count(BadSample(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{self.path}:{number}: not a record of a refused sample ({error}); move the file away"
                ) from error
