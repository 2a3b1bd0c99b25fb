"""Degenerate text: pure functions from a text to a `Finding`, or None.

The report only names "infinite repetition" as an example; the measures and limits are ours and stand in
`rules.DegenerateText`. Words and n-grams are those of `curate/words.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from megatron_vl.data.curate.reasons import Finding
from megatron_vl.data.curate.rules import DegenerateText
from megatron_vl.data.curate.words import WordStream, normalize, split_words, word_hashes
from megatron_vl.data.sample import Sample, TextPart

_ANCHOR_WORDS = 8  # of the last words, searched for further up to find the length of a loop
_LONGEST_LOOP = 512
_CUT_OFF = ("length", "max_tokens")
_FENCE = re.compile(r"^\s{0,3}```", re.MULTILINE)


def find_degenerate_text(
    sample: Sample, record: Mapping[str, object], rule: DegenerateText
) -> Finding | None:
    """The first thing wrong with the texts of a sample.

    Every turn is judged by itself, a document as a whole. record: the JSON object of the sample, for
    `finish_reason`.
    """
    if sample.messages:
        turns = [(message.role, _text(message.parts)) for message in sample.messages]
    else:
        turns = [("document", _text(sample.document))]
    for number, (role, text) in enumerate(turns):
        where = role if role == "document" else f"turn {number} ({role})"
        found = find_repetition(text, rule)
        if found is None and rule.check_answers and role == "assistant":
            found = find_bad_answer(text)
        if found is not None:
            return Finding(found.reason, f"{where}: {found.detail}")
    if rule.check_answers and record.get("finish_reason") in _CUT_OFF:
        return Finding("truncated_answer", f"finish_reason is {record['finish_reason']!r}")
    return None


def find_repetition(text: str, rule: DegenerateText) -> Finding | None:
    """character_run, repeated_lines, repeated_ngrams or looping_end. Cheapest first."""
    found = _character_run(text, rule.max_character_run) or _repeated_lines(text, rule)
    if found is not None:
        return found
    words = split_words(normalize(text))
    if len(words) < min(rule.min_words, rule.min_loop_words):
        return None
    hashes = word_hashes(words)
    found = _repeated_ngrams(hashes, rule) if len(words) >= rule.min_words else None
    return found or _looping_end(hashes, words, rule.min_loop_words)


def find_bad_answer(text: str) -> Finding | None:
    """unclosed_think, empty_answer or truncated_answer of one assistant turn."""
    opened, closed = text.count("<think>"), text.count("</think>")
    if opened > closed or closed > 1 and closed > opened:
        return Finding("unclosed_think", f"{opened} <think> and {closed} </think>")
    # Templates that end in <think> leave the opening tag to the prompt, so a lone </think> is fine.
    answer = text.rpartition("</think>")[2]
    if not answer.strip():
        return Finding("empty_answer", "nothing but white space" + (" after </think>" if closed else ""))
    if len(_FENCE.findall(answer)) % 2:
        return Finding("truncated_answer", "a code block is opened and not closed")
    if (start := answer.rfind("\\boxed{")) >= 0 and not _closes(answer[start + len("\\boxed") :]):
        return Finding("truncated_answer", "\\boxed{ is not closed")
    return None


def longest_character_run(text: str) -> tuple[str, int]:
    """The character with the longest run and its length; white space does not count."""
    if not text:
        return "", 0
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    lengths = np.diff(np.append(starts, len(codes)))
    for run in np.argsort(-lengths, kind="stable"):
        if not (character := text[starts[run]]).isspace():
            return character, int(lengths[run])
    return "", 0


def _character_run(text: str, limit: int) -> Finding | None:
    if len(text) <= limit:
        return None
    character, length = longest_character_run(text)
    if length <= limit:
        return None
    return Finding("character_run", f"{character!r} stands {length} times in a row; the limit is {limit}")


def _repeated_lines(text: str, rule: DegenerateText) -> Finding | None:
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    if len(lines) < rule.min_lines:
        return None
    repeated = len(lines) - len(set(lines))
    ratio = repeated / len(lines)
    if ratio <= rule.max_repeated_line_ratio:
        return None
    return Finding(
        "repeated_lines",
        f"{repeated} of {len(lines)} lines repeat earlier ones ({ratio:.2f}); "
        f"the limit is {rule.max_repeated_line_ratio}",
    )


def _repeated_ngrams(hashes: np.ndarray, rule: DegenerateText) -> Finding | None:
    windows = WordStream.of(hashes).windows(rule.ngram)
    if not len(windows):
        return None
    repeated = len(windows) - len(np.unique(windows))
    ratio = repeated / len(windows)
    if ratio <= rule.max_repeated_ngram_ratio:
        return None
    return Finding(
        "repeated_ngrams",
        f"{repeated} of {len(windows)} {rule.ngram}-grams repeat earlier ones ({ratio:.2f}); "
        f"the limit is {rule.max_repeated_ngram_ratio}",
    )


def _looping_end(hashes: np.ndarray, words: list[str], min_words: int) -> Finding | None:
    """A text may be long and fine, and still end in a loop that no share of the whole shows."""
    if len(hashes) < max(min_words, 2 * _ANCHOR_WORDS):
        return None
    windows = WordStream.of(hashes).windows(_ANCHOR_WORDS)
    earlier = np.flatnonzero(windows[:-1] == windows[-1])
    if not len(earlier):
        return None
    period = int(len(windows) - 1 - earlier[-1])
    if period > _LONGEST_LOOP:
        return None
    differs = np.flatnonzero(hashes[period:] != hashes[:-period])
    start = int(differs[-1]) + 1 if len(differs) else 0
    looping = len(hashes) - start
    if looping < max(min_words, 3 * period):
        return None
    unit = " ".join(words[-period:][:8])
    return Finding("looping_end", f"the last {looping} words repeat a unit of {period}: {unit!r}")


def _closes(text: str) -> bool:
    """Whether the brace that `text` begins with is closed."""
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return True
    return False


def _text(parts: tuple) -> str:
    return "\n".join(part.text for part in parts if isinstance(part, TextPart))
