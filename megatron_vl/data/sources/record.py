"""What a source hands out: one record per sample, still unread, that knows how it is to be read.

A record travels through ordering and loading as it stands in its file; only `parse` looks inside, so that a
bad sample costs nothing before its turn comes and is refused where it is counted. The parts of a source that
the rest of the package may rely on are those of `Source`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.sample import Sample, parse_sample


@dataclass(frozen=True)
class TokenSample:
    """Pre-tokenised text: every token is learnt from. ids: int64 [n], n >= 1, checked against the vocabulary."""

    id: str
    ids: np.ndarray


@dataclass(frozen=True)
class Record(RawLine):
    """One sample as it stands in its file.

    source: the file. line: number of the sample within it, from 1. data: its bytes. Subclasses say in `parse`
    how they are read, and in `default_id` how a sample is called that brings no id.
    """

    def parse(self) -> Sample | TokenSample:
        """The sample. Raises SampleRefused with a code of `reasons.REASONS`, and nothing else."""
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class ConversationLine(Record):
    """A line in the form of `data/sample.py`."""

    def parse(self) -> Sample:
        return parse_sample(self.data, self.default_id)


class Source(Protocol):
    """Random access to samples. Travels to spawned workers, which open their own file handles."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record number `index`. Raises IndexError, and DataError when a file changed under the run."""

    def describe(self) -> list[dict[str, int | str]]:
        """Path, bytes and number of samples per file: what must not change before a run is resumed."""

    def refused(self) -> list[BadSample]:
        """What was refused while the files were indexed, and so has no number (at most
        `index_file.MOST_LISTED` entries per file; `refused_counts` has all)."""

    def refused_counts(self) -> dict[str, int]:
        """Everything that was refused while the files were indexed, by reason."""

    def close(self) -> None: ...
