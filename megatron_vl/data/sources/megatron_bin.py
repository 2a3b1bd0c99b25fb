"""Pre-tokenised text in Megatron's format: `name.bin` with token ids and `name.idx` with their places.

The layout (megatron.core.datasets.indexed_dataset, little-endian): magic `MMIDIDX\\0\\0`, u64 version 1, u8 code of
the number type, u64 S sequences, u64 D document borders, int32[S] lengths in tokens, int64[S] places in bytes,
int64[D] borders in sequences (the first is 0, the last S); then int8[S] modes if the data are multimodal.

Read here and not by megatron-core's IndexedDataset, because that one trusts the file: lengths and places are
not compared with the size of the .bin, a wrong file ends in an assertion, and importing it brings torch,
megatron.core and its storage clients into every loading process. The index of the format is mapped as it is;
nothing is stored beside it.

A sample is one document: all its sequences, in order. Every token is scored.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_vl.config.model import ModelConfig
from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sources.files import IndexedFiles
from megatron_vl.data.sources.index_file import FileIndex, Scan
from megatron_vl.data.sources.record import Record, TokenSample
from megatron_vl.data.special_tokens import IMAGE_TOKENS
from megatron_vl.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}


@dataclass(frozen=True)
class TokenRule:
    """Which ids a text may hold: from 0 to below vocab_size, none of `forbidden`."""

    vocab_size: int
    forbidden: tuple[int, ...] = ()

    @classmethod
    def for_model(cls, model: ModelConfig) -> TokenRule:
        """The vocabulary of a model; what only images may bring is forbidden."""
        ids = asdict(model.tokens)
        return cls(model.text.vocab_size, tuple(sorted(ids[name] for name in IMAGE_TOKENS)))

    def check(self, ids: np.ndarray) -> None:
        """ids: int64 [n]. Raises SampleRefused empty_document, id_outside_vocabulary, image_id_in_text."""
        if not len(ids):
            raise SampleRefused("empty_document", "the document has no token")
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if len(outside):
            at = int(outside[0])
            raise SampleRefused(
                "id_outside_vocabulary",
                f"{len(outside)} ids, the first is {int(ids[at])} at {at}; the vocabulary has {self.vocab_size}",
            )
        of_images = np.flatnonzero(np.isin(ids, self.forbidden))
        if len(of_images):
            at = int(of_images[0])
            raise SampleRefused(
                "image_id_in_text", f"{len(of_images)} ids of images, the first is {int(ids[at])} at {at}"
            )


@dataclass(frozen=True)
class TokenRecord(Record):
    """One document. data: its ids as numbers of type dtype."""

    dtype: str
    rule: TokenRule

    def parse(self) -> TokenSample:
        """Its ids as int64. Raises SampleRefused as `TokenRule.check`."""
        ids = np.frombuffer(self.data, dtype=self.dtype).astype(np.int64)
        try:
            self.rule.check(ids)
        except SampleRefused as refusal:
            raise SampleRefused(refusal.reason, refusal.detail, self.default_id) from refusal
        return TokenSample(self.default_id, ids)


class MegatronSource(IndexedFiles):
    """Documents of `.bin` files. paths: either file of a pair, or their common prefix. Raises DataError."""

    def __init__(self, paths: Sequence[str], rule: TokenRule):
        self.rule = rule
        self._pairs = [_IdxFile(prefix) for prefix in prefixes(paths)]
        super().__init__([pair.as_index() for pair in self._pairs])

    def describe(self) -> list[dict[str, int | str]]:
        """Both files of each pair; the samples are counted with the .bin."""
        found = []
        for file, pair in zip(super().describe(), self._pairs, strict=True):
            found += [file, {"path": pair.idx_path, "bytes": pair.idx_size, "samples": 0}]
        return found

    def _read(self, number: int, within: int) -> TokenRecord:
        pair = self._pairs[number]
        first, behind = int(pair.borders[within]), int(pair.borders[within + 1])
        size = pair.dtype.itemsize
        pieces: list[bytes] = []
        for place, length in zip(pair.places[first:behind], pair.lengths[first:behind]):
            pieces.append(self._bytes_at(number, int(place), int(length) * size))
        return TokenRecord(pair.bin_path, within + 1, b"".join(pieces), pair.dtype.str, self.rule)


def prefixes(paths: Iterable[str]) -> list[str]:
    """`a.bin`, `a.idx` and `a` all mean `a`; both files of a pair, one after the other, mean it once."""
    found: list[str] = []
    for path in map(os.path.abspath, paths):
        prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
        if not found or found[-1] != prefix:
            found.append(prefix)
    if not found:
        raise DataError("no .bin/.idx pair is given; name at least one of its files")
    return found


class _IdxFile:
    """The mapped and checked `.idx` of one pair. lengths: int32 [S]. places: int64 [S]. borders: int64 [D]."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.idx_path, self.bin_path = f"{prefix}.idx", f"{prefix}.bin"
        try:
            self.bin_size = os.stat(self.bin_path).st_size
            self.bin_mtime_ns = os.stat(self.bin_path).st_mtime_ns
            self.idx_size = os.stat(self.idx_path).st_size
            with open(self.idx_path, "rb") as file:
                head = file.read(_HEADER.size)
        except OSError as error:
            raise DataError(
                f"{error.filename}: cannot be read ({error.strerror}); .bin and .idx must lie side by side"
            ) from error
        self.dtype, sequences, borders = self._checked_header(head, self.idx_size)
        self._map(sequences, borders)
        self._check()

    def _checked_header(self, head: bytes, idx_size: int) -> tuple[np.dtype, int, int]:
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise DataError(
                f"{self.idx_path}: no Megatron index (it begins with {head[:9]!r}); name another file"
            )
        _, version, code, sequences, borders = _HEADER.unpack(head)
        if version != 1 or code not in _DTYPES:
            what = f"numbers of type {_FLOATS.get(code, code)}" if version == 1 else f"version {version}"
            raise DataError(f"{self.idx_path}: {what}; token ids are integers in version 1, write it again")
        expected = _HEADER.size + sequences * 12 + borders * 8
        if idx_size == expected + sequences and sequences:
            raise DataError(
                f"{self.idx_path}: has modes, so it is multimodal in Megatron's own way, which says nothing about "
                "the images; give such data as WebDataset or JSONL"
            )
        if idx_size != expected:
            raise DataError(
                f"{self.idx_path}: {idx_size} bytes, but {sequences} sequences and {borders} borders take {expected}; "
                "it is truncated or damaged, write it again"
            )
        return np.dtype(_DTYPES[code]), sequences, borders

    def _map(self, sequences: int, borders: int) -> None:
        whole = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        edges = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * borders])
        pieces = [np.asarray(whole[edges[n] : edges[n + 1]]) for n in range(3)]
        self.lengths, self.places, self.borders = (
            piece.view(kind) for piece, kind in zip(pieces, ("<i4", "<i8", "<i8"))
        )

    def _check(self) -> None:
        """Places and borders that a damaged or foreign index may hold. One pass over the arrays."""
        borders, places = self.borders, self.places
        good_borders = len(borders) >= 2 and borders[0] == 0 and borders[-1] == len(places)
        if not good_borders or np.any(np.diff(borders) < 0):
            raise DataError(
                f"{self.idx_path}: its document borders do not go from 0 to {len(places)} sequences in order, or "
                "there is no document; write it again"
            )
        ends = places + self.lengths.astype(np.int64) * self.dtype.itemsize
        outside = (places < 0) | (places > self.bin_size) | (ends > self.bin_size)
        bad = np.flatnonzero(outside | (self.lengths < 0))
        if len(bad):
            raise DataError(
                f"{self.bin_path}: {self.bin_size} bytes, but sequence {int(bad[0])} goes from byte "
                f"{int(places[bad[0]])} to {int(ends[bad[0]])}; it is truncated or belongs to another .idx"
            )

    def as_index(self) -> FileIndex:
        """Size and identity of the .bin; the arrays stay here."""
        scan = Scan(len(self.borders) - 1, {})
        return FileIndex(os.path.abspath(self.bin_path), "megatron-1", self.bin_size, self.bin_mtime_ns, scan)

    def __reduce__(self):
        return _IdxFile, (self.prefix,)
