"""Text as a stream of 64-bit word hashes, equal for spellings that differ in case, white space or Unicode form.

Normalisation (ours; the report does not give one): Unicode NFKC, case folding, invisible format characters
out. A word is a run of letters and digits; every character of a script that is written without spaces (Han,
kana, Thai, Lao, Burmese, Khmer) is a word of its own. Punctuation separates and is otherwise ignored.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

_SINGLE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+")
_SIGN = re.compile(
    r"(?<![-+*/^=<>%])[+*/^=<>%](?![-+*/^=<>%])"  # single ones: ** and --- are mark-up
    r"|(?<![-+*/^=<>%A-Za-z])-(?![-+*/^=<>%])|[\u00b1\u00d7\u00f7\u2200-\u22ff]"
)
# Format characters (soft hyphen, zero-width space and joiners, direction marks, byte order mark) show nothing.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
# Places of images and objects in a text are no words: "<image>", "<image 1>", "<object:2>".
_PLACEHOLDER = re.compile(r"<(?:image(?:[ _]?\d+)?|object:\d+)>", re.IGNORECASE)
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
_CACHE_LIMIT = 2_000_000

# An odd multiplier is invertible modulo 2**64, so that the hash of any window follows from prefix sums.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


class _WordHashes(dict[str, int]):
    """word -> 64 bits of BLAKE2b, computed once per process. (Python's own hash differs between processes.)"""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHE_LIMIT:
            self.clear()
        value = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value


_HASHES = _WordHashes()


def normalize(text: str) -> str:
    """NFKC, case folded, without invisible characters and placeholders, dashes as '-'. Line breaks stay."""
    if "<" in text:
        text = _PLACEHOLDER.sub(" ", text)
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    return unicodedata.normalize("NFKC", folded).translate(_DASHES)


def split_words(normalized: str) -> list[str]:
    """The words of a normalised text."""
    return _WORD.findall(normalized)


def signs(normalized: str) -> str:
    """The mathematical signs of a normalised text in order: `3 + 4` and `3 - 4` have the same words."""
    return "".join(_SIGN.findall(normalized))


def word_hashes(words: list[str]) -> np.ndarray:
    """uint64 [n]."""
    return np.fromiter(map(_HASHES.__getitem__, words), dtype=np.uint64, count=len(words))


def powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """_BASE ** i and its inverse modulo 2**64 for i < count: uint64 [count] each."""
    if count > len(_POWERS[0]):
        size = 1 << max(10, (count - 1).bit_length())
        for number, base in enumerate((_BASE, _INVERSE)):
            values = np.full(size, base, dtype=np.uint64)
            values[0] = 1
            _POWERS[number] = np.multiply.accumulate(values)
    return _POWERS[0][:count], _POWERS[1][:count]


_POWERS: list[np.ndarray] = [np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64)]


@dataclass(frozen=True)
class WordStream:
    """Word hashes of a text with prefix sums, so that the hash of any stretch is one multiplication.

    hashes: uint64 [n]. sums: uint64 [n + 1], sum of hashes[i] * _BASE ** i. All arithmetic is modulo 2**64.
    """

    hashes: np.ndarray
    sums: np.ndarray

    @classmethod
    def of(cls, hashes: np.ndarray) -> WordStream:
        sums = np.zeros(len(hashes) + 1, dtype=np.uint64)
        np.cumsum(hashes * powers(len(hashes))[0], out=sums[1:])
        return cls(hashes, sums)

    def stretches(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Hashes of the words [start, end): uint64, independent of where in the stream they stand."""
        inverse = powers(len(self.sums))[1]
        lengths = (ends - starts).astype(np.uint64)
        return (self.sums[ends] - self.sums[starts]) * inverse[starts] + lengths * np.uint64(_BASE)

    def windows(self, length: int) -> np.ndarray:
        """Hashes of all windows of `length` words: uint64 [max(0, n - length + 1)]."""
        starts = np.arange(max(0, len(self.hashes) - length + 1))
        return self.stretches(starts, starts + length)
