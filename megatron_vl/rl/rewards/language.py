"""Whether a response stays in the language of its prompt, judged by script.

Language detectors fail on short technical text (one took "First we compute" for German), so only scripts are
compared, in the prose that is left without mathematics, code, quotations and addresses, and the penalty grows
softly. Languages of one script are not told apart. The rule and its numbers are ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

LEAST_WORDS = 20  # fewer say nothing about the language
CLEAR_SHARE = 0.8  # of one script, for a prompt to set the language

# Lengths are bounded: what is never closed must not be searched for to the end again and again.
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)"  # code
    r"|`[^`\n]*`"
    r"|\$\$.{0,2000}?\$\$|\$[^$\n]*\$|\\\(.{0,2000}?\\\)|\\\[.{0,2000}?\\\]"  # mathematics
    r"|\\[A-Za-z]+\*?(?:\{[^{}]*\})*"
    r"|https?://\S+"
    r'|"[^"\n]{0,400}"|“[^”]{0,400}”|「[^」]{0,400}」|『[^』]{0,400}』|«[^»]{0,400}»',
    re.DOTALL,
)
# Scripts written without spaces between words: every second character counts as a word.
_DENSE = ("HAN", "KANA", "THAI")


def language_penalty(prompt: str, response: str, share: float = CLEAR_SHARE) -> float:
    """0 if at least `share` of the response's words are in the prompt's script, growing linearly to 1 at none.

    0 also where the prompt mixes scripts or either text is too short. Han characters count as Japanese beside kana.
    """
    wanted = scripts(prompt)
    total = sum(wanted.values())
    main = max(wanted, key=lambda name: wanted[name], default="")
    japanese = main == "KANA" or (main == "HAN" and wanted["KANA"] > 0.2 * total)
    allowed = {"HAN", "KANA"} if japanese else {main}
    given = scripts(response)
    words = sum(given.values())
    if total == 0 or sum(wanted[name] for name in allowed) < CLEAR_SHARE * total or words < LEAST_WORDS:
        return 0.0
    found = sum(given[name] for name in allowed) / words
    return max(0.0, share - found) / share


def scripts(text: str) -> Counter[str]:
    """Words of the prose of a text by script (`LATIN`, `HAN`, `KANA`, `CYRILLIC`, ...)."""
    words: Counter[str] = Counter()
    previous = ""
    for char in _NOT_PROSE.sub(" ", text):
        script = _script(char)
        if script in _DENSE:
            words[script] += 0.5
        elif script and script != previous:
            words[script] += 1
        previous = script
    return words


@lru_cache(maxsize=65536)
def _script(char: str) -> str:
    """First word of a letter's Unicode name, with the syllabaries of Japanese as one; empty for other characters."""
    if not char.isalpha():
        return ""
    first = unicodedata.name(char, "").partition(" ")[0]
    return {"CJK": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA"}.get(
        first, first
    )
