"""Text that a sample shares with a benchmark: equal to an item, or the same n-gram (TR: n = 64).

What is compared is the stream of words of the whole sample (`curate/words.py`), so that an overlap is found
wherever it stands: across parts, turns and images. Hashes only find candidates; every hit is confirmed word
by word, by 64-bit hashes of each word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_vl.data.curate.benchmarks import Item
from megatron_vl.data.curate.words import WordStream, normalize, signs, split_words, word_hashes
from megatron_vl.data.sample import Sample, TextPart

_SHOWN_CHARACTERS = 80
_ARRAYS = ("words", "offsets", "exact_hashes", "exact_items", "gram_hashes", "gram_starts")


@dataclass(frozen=True)
class Overlap:
    """reason: exact_overlap or ngram_overlap. item: number of the benchmark item. detail: the sentence."""

    reason: str
    item: int
    detail: str


@dataclass(frozen=True)
class BenchmarkIndex:
    """All items of the benchmarks, for looking up.

    words: uint64, word hashes of all items one after the other. offsets: int64 [items + 1] into it.
    exact_hashes (uint64, sorted), exact_items: whole items. gram_hashes (uint64, sorted), gram_starts: every
    window of `ngram` words, by its place in `words`. names, heads, signs: per item, the place it comes from,
    the beginning of its text and its mathematical signs.
    """

    ngram: int
    words: np.ndarray
    offsets: np.ndarray
    exact_hashes: np.ndarray
    exact_items: np.ndarray
    gram_hashes: np.ndarray
    gram_starts: np.ndarray
    names: list[str]
    heads: list[str]
    signs: list[str]

    def find(self, texts: TextLines) -> Overlap | None:
        """The first overlap of a sample: exact ones before n-grams."""
        return self._find_exact(texts) or self._find_gram(texts)

    def item_words(self, item: int) -> np.ndarray:
        return self.words[self.offsets[item] : self.offsets[item + 1]]

    def save(self, folder: str) -> None:
        """Writes the index so that worker processes can share it as memory maps."""
        os.makedirs(folder, exist_ok=True)
        for name in _ARRAYS:
            np.save(os.path.join(folder, f"{name}.npy"), getattr(self, name), allow_pickle=False)
        lists = {"ngram": self.ngram, "names": self.names, "heads": self.heads, "signs": self.signs}
        with open(os.path.join(folder, "items.json"), "w", encoding="utf-8") as file:
            json.dump(lists, file)

    @classmethod
    def load(cls, folder: str) -> BenchmarkIndex:
        with open(os.path.join(folder, "items.json"), encoding="utf-8") as file:
            lists = json.load(file)
        arrays = {
            # an empty file cannot be mapped, and a small one need not be
            name: np.load(os.path.join(folder, f"{name}.npy"), allow_pickle=False, mmap_mode=mode)
            for name in _ARRAYS
            for mode in ["r" if os.path.getsize(os.path.join(folder, f"{name}.npy")) > 4096 else None]
        }
        return cls(**lists, **arrays)

    def _find_exact(self, texts: TextLines) -> Overlap | None:
        starts, ends = texts.stretches()
        hashes = texts.stream.stretches(starts, ends)
        for number in np.flatnonzero(_contains(self.exact_hashes, hashes)):
            start, end = int(starts[number]), int(ends[number])
            for place in _places(self.exact_hashes, hashes[number]):
                item = int(self.exact_items[place])
                same = np.array_equal(self.item_words(item), texts.stream.hashes[start:end])
                if same and self.signs[item] == texts.signs_of(int(number)):
                    return self._overlap("exact_overlap", item, f"{end - start} words equal")
        return None

    def _find_gram(self, texts: TextLines) -> Overlap | None:
        hashes = texts.stream.windows(self.ngram)
        for start in np.flatnonzero(_contains(self.gram_hashes, hashes)):
            ours = texts.stream.hashes[start : start + self.ngram]
            for place in _places(self.gram_hashes, hashes[start]):
                there = int(self.gram_starts[place])
                if np.array_equal(self.words[there : there + self.ngram], ours):
                    item = int(np.searchsorted(self.offsets, there, side="right")) - 1
                    return self._overlap(
                        "ngram_overlap", item, f"{self.ngram} words from word {start} on are"
                    )
        return None

    def _overlap(self, reason: str, item: int, what: str) -> Overlap:
        joint = "to" if reason == "exact_overlap" else "in"
        return Overlap(reason, item, f"{what} {joint} {self.names[item]}: {self.heads[item]!r}")


class TextLines:
    """The texts of a sample as one word stream that remembers its lines.

    blocks: what makes sense by itself (lines, text parts, turns, the whole) as (first word, word after, first
    line, line after).
    """

    def __init__(self, turns: Iterable[Iterable[str]]):
        words: list[str] = []
        lines: list[str] = []
        blocks = set()
        for turn in turns:
            turn_start = (len(words), len(lines))
            for part in turn:
                part_start = (len(words), len(lines))
                for line in normalize(part).splitlines():
                    line_start = len(words)
                    words += split_words(line)
                    blocks.add((line_start, len(words), len(lines), len(lines) + 1))
                    lines.append(line)
                blocks.add((part_start[0], len(words), part_start[1], len(lines)))
            blocks.add((turn_start[0], len(words), turn_start[1], len(lines)))
        blocks.add((0, len(words), 0, len(lines)))
        self.stream = WordStream.of(word_hashes(words))
        self.blocks = sorted(block for block in blocks if block[1] > block[0])
        self._lines = lines

    @classmethod
    def of_sample(cls, sample: Sample) -> TextLines:
        turns = [message.parts for message in sample.messages] or [sample.document]
        return cls([part.text for part in parts if isinstance(part, TextPart)] for parts in turns)

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the blocks in words: int64 each."""
        table = np.array(self.blocks, dtype=np.int64).reshape(-1, 4)
        return table[:, 0], table[:, 1]

    def signs_of(self, block: int) -> str:
        """Mathematical signs of a block."""
        _, _, first, after = self.blocks[block]
        return "".join(map(signs, self._lines[first:after]))


def build_index(
    items: Iterable[Item], ngram: int, exact_min_words: int
) -> tuple[BenchmarkIndex, dict[str, int]]:
    """The index of the items, and how many of them can be matched in which way.

    Counts: items, without_words (nothing but signs, never matched), too_short_for_exact, too_short_for_ngram.
    """
    names, heads, item_signs, streams = [], [], [], []
    counts = dict.fromkeys(("items", "without_words", "too_short_for_exact", "too_short_for_ngram"), 0)
    for item in items:
        lines = normalize(item.text).splitlines()
        words = [word for line in lines for word in split_words(line)]
        counts["items"] += 1
        counts["without_words"] += not words
        counts["too_short_for_exact"] += 0 < len(words) < exact_min_words
        counts["too_short_for_ngram"] += 0 < len(words) < ngram
        if words:
            names.append(item.name)
            heads.append(" ".join(item.text[: 4 * _SHOWN_CHARACTERS].split())[:_SHOWN_CHARACTERS])
            item_signs.append("".join(map(signs, lines)))
            streams.append(WordStream.of(word_hashes(words)))
    lengths = np.array([len(stream.hashes) for stream in streams], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    whole = [stream.stretches(np.array([0]), np.array([len(stream.hashes)])) for stream in streams]
    exact_items = np.flatnonzero(lengths >= exact_min_words)
    exact_hashes = _joined(whole)[exact_items]
    exact_order = np.argsort(exact_hashes, kind="stable")
    gram_hashes = _joined([stream.windows(ngram) for stream in streams])
    gram_starts = _joined(
        [np.arange(offset, offset + max(0, length - ngram + 1)) for offset, length in zip(offsets, lengths)]
    ).astype(np.int64)
    gram_order = np.argsort(gram_hashes, kind="stable")
    index = BenchmarkIndex(
        ngram=ngram,
        words=_joined([stream.hashes for stream in streams]),
        offsets=offsets,
        exact_hashes=exact_hashes[exact_order],
        exact_items=exact_items[exact_order],
        gram_hashes=gram_hashes[gram_order],
        gram_starts=gram_starts[gram_order],
        names=names,
        heads=heads,
        signs=item_signs,
    )
    return index, counts


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which values occur in a sorted array: bool."""
    if not len(ordered) or not len(values):
        return np.zeros(len(values), dtype=bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


def _places(ordered: np.ndarray, value: np.uint64) -> range:
    """Places of a value in a sorted array."""
    return range(*(int(np.searchsorted(ordered, value, side=side)) for side in ("left", "right")))


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.uint64)
