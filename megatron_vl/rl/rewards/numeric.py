"""Numbers: with tolerance and units, and counts. Numbers are read by an own grammar, never evaluated."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

from megatron_vl.rl.rewards.extract import Extracted
from megatron_vl.rl.rewards.verdict import NotAnAnswer, Ok, shown

MAX_DIGITS = 32  # characters of one number
# fmt: off
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on

# Words behind a number that multiply it: powers of ten.
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_FLOAT = rf"{_PLAIN}(?:[eE][+-]?[0-9]+)?"
_POWER = r"10\s*\^\s*(?:\{\s*(?P<%s>[+-]?[0-9]+)\s*\}|(?P<%s>[+-]?[0-9]+))"
_TENS = rf"\s*(?:\\times|\\cdot|[\u00d7\u00b7*x])\s*{_POWER % ('braced', 'bare')}"
_FRACTION = (
    rf"\\[dt]?frac\s*(?:\{{\s*(?P<above>[+-]?{_PLAIN})\s*\}}\s*\{{\s*(?P<below>[+-]?{_PLAIN})\s*\}}"
    r"|(?P<over>[0-9])\s*(?P<under>[0-9]))"
)
_NUMBER = (
    r"(?:(?P<sign>[+-]|(?i:\b(?:minus|negative)\b))\s*)?(?:(?:\b[A-Z]{1,3})?\\?[$€£¥]\s*(?P<inner>[+-])?)?(?:"
    rf"{_FRACTION}|(?:(?P<whole>[0-9]+)\s+)?(?P<left>{_PLAIN})\s*/\s*(?P<right>{_PLAIN})"
    rf"|{_POWER % ('braces', 'power')}|(?P<number>{_FLOAT})(?:{_TENS})?)"
    rf"(?:(?P<percent>\s*(?:\\?%|(?i:per\s?cent\b)))|\s*(?i:(?P<scale>SCALE)\b))?(?:\s*\\?[$€£¥])?"
)
_NOT_FINITE = re.compile(r"(?i)(?<![a-z])(?:nan|inf|infinity)(?![a-z])|\\infty|\u221e")
_TENS_WORDS = ("thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBER_WORDS = re.compile(rf"(?i)\b(?:{'|'.join((*WORDS, *_TENS_WORDS, *SCALES))})\b")
# What makes a line say something else than its number: doubt, denial, comparison, multiples, arithmetic.
_HEDGE = re.compile(
    r"(?i)\b(?:or|not|no|none|never|nor|neither|nothing|cannot|except|excluding|but|wrong|incorrect|false"
    r"|between|about|around|approx|approximately|circa|roughly|nearly|almost|maybe|perhaps|possibly|probably"
    r"|least|most|less|fewer|more|than|to|either|another|each|apiece|minus|negative|plus"
    r"|dozens?|pairs?|couples?|twice|squared|cubed|root|factorial|pi|lakhs?|crores?"
    r"|hundreds|thousands|millions|billions|trillions)\b|n['\u2019]t\b"
    r"|[<>\u2264\u2265\u00b1\u2213~\u2248\u2243\u2245\u2260^!?\u221a+*/=|\\#\u00d7\u00b7\u03c0\u2030\u2031]"
    r"|[或不没約约近半负負十百千万萬亿億]"
)
_PARTS = r"(?:half|halves|(?:third|quarter|fifth|tenth|hundredth|thousandth|millionth)s?)"
# Directly behind a number: abbreviated millions, letters of mathematics, fractions in words, a compound ("5-year").
_BEHIND = re.compile(
    rf"\s*(?:[eikxyzMB]|bn|mn|mio|score|(?:and\s+)?(?:an?\s+)?(?i:{_PARTS}))(?![a-zA-Z])|[-_]"
)
# Directly before it: a limit, a function, a part or a multiple; a dash that may be a sign, a sign before a bracket, a
# second sign.
_BEFORE = re.compile(
    r"(?:\b(?i:over|under|above|below|beyond|without|sqrt|log|ln|exp|sin|cos|tan|double|triple"
    rf"|{_PARTS}(?:\s+of)?(?:\s+the)?)\s+|[\u2014\u2015]|[-+]\s*[(\[{{]?\s*|[._])$"
)
# With units: a word or sign that looks like another one, and what makes another one of a unit.
_UNIT_LIKE = re.compile(r"\s*[(\[]?\s*[^\W0-9_]|\s*[\u00b0'\"\u2032\u2033]")
_PER = re.compile(r"\s*(?:per\b|[a-zA-Z](?![a-zA-Z]))")


def score_numeric(
    gold: float, abs_tolerance: float, rel_tolerance: float, units: Sequence[str], answer: Extracted
) -> Ok:
    """1 if |answer - gold| <= max(abs_tolerance, rel_tolerance * |gold|), else 0.

    units: spellings that may follow the number and are ignored; with "%" among them a percent sign is one of these,
    otherwise it divides by 100. Raises NotAnAnswer: see `read_number`.
    """
    return Ok(float(abs(read_number(answer, units) - gold) <= max(abs_tolerance, rel_tolerance * abs(gold))))


def score_count(gold: int, answer: Extracted) -> Ok:
    """1 if the answer is the whole number `gold`, as digits or as an English word up to twenty, else 0.

    A number that is not whole or below 0 is no count. Raises NotAnAnswer (`not_a_count`, and as `read_number`).
    """
    word = _cleaned(answer.text).lower()
    value = float(WORDS.index(word)) if word in WORDS else read_number(answer, ())
    if value < 0 or value != int(value):
        raise NotAnAnswer("not_a_count", f"{value:g} is not a number of things")
    return Ok(float(value == gold))


def read_number(answer: Extracted, units: Sequence[str]) -> float:
    r"""The one number of an answer, with its sign, currency sign, scale ("5 million") and percent.

    In a `\boxed{}` nothing else may stand but a unit; in a line there may be words around it, but no second number
    and no word that changes it ("about 5", "5 dozen", "not 5"). Where there are units, only these may follow the number
    directly. Raises NotAnAnswer (`not_finite`, `several_answers`, `not_a_number`, `hedged`, `number_too_long`).
    """
    text, pattern = _cleaned(answer.text), _quantity(tuple(units))
    if _NOT_FINITE.search(text):
        raise NotAnAnswer("not_finite", shown(answer.text))
    percent_is_unit = any(unit.lower() in ("%", r"\%", "percent", "per cent") for unit in units)
    whole = pattern.fullmatch(text)
    if whole:
        return _value(whole, percent_is_unit)
    found = list(pattern.finditer(text))
    if len(found) > 1:
        raise NotAnAnswer("several_answers", f"{len(found)} numbers in {shown(answer.text)}")
    if answer.boxed or not found:
        raise NotAnAnswer("not_a_number", f"{shown(answer.text)} is not one number")
    before, after = text[: found[0].start()], text[found[0].end() :]
    around = f"{before} {after}"
    if _NUMBER_WORDS.search(around):
        raise NotAnAnswer("several_answers", f"a number and a number in words in {shown(answer.text)}")
    other_unit = units and (found[0]["unit"] is None and _UNIT_LIKE.match(after) or _PER.match(after))
    if (
        other_unit
        or _HEDGE.search(around)
        or _BEHIND.match(after)
        or _BEFORE.search(before)
        or _glued(before, after)
    ):
        raise NotAnAnswer("hedged", f"{shown(answer.text)} says more than a number")
    return _value(found[0], percent_is_unit)


@lru_cache(maxsize=4096)
def _quantity(units: tuple[str, ...]) -> re.Pattern:
    """What reads a number with one of the units behind it."""
    spelled = sorted({_cleaned(unit) for unit in units} - {"", "%", r"\%"}, key=len, reverse=True)
    unit = "|".join(map(re.escape, spelled)) or r"(?!)"
    scale = "|".join(sorted(set(SCALES) - set(spelled))) or r"(?!)"
    number = _NUMBER.replace("SCALE", scale)
    return re.compile(rf"{number}(?:\s*(?P<unit>{unit})(?![A-Za-z0-9^_]))?")


def _unit_form(text: str) -> str:
    """A unit as it is compared: cm^{2}, cm^2 and cm ^2 are one, and so are ^{\\circ} and the sign of degrees."""
    text = re.sub(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b", "\u00b0", text)
    text = re.sub(r"\s*\^\s*\{?\s*([+-]?[0-9]+)\s*\}?", r"^\1", text)
    return " ".join(text.split())


def parse_float(text: str) -> float:
    """A plain decimal number, for coordinates. Raises NotAnAnswer (`not_finite`, `number_too_long`, `not_a_number`)."""
    text = text.strip()
    if _NOT_FINITE.search(text):
        raise NotAnAnswer("not_finite", shown(text))
    if not re.fullmatch(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", text):
        raise NotAnAnswer("not_a_number", shown(text))
    return _finite(text)


def _finite(text: str) -> float:
    """The value of digits. A number of many digits is refused before it is converted."""
    if len(text) > MAX_DIGITS:
        raise NotAnAnswer("number_too_long", f"{len(text)} characters, at most {MAX_DIGITS}")
    value = float(text.replace(",", ""))
    if not math.isfinite(value):
        raise NotAnAnswer("not_finite", shown(text))
    return value


def _value(match: re.Match, percent_is_unit: bool) -> float:
    if match["sign"] and match["inner"]:
        raise NotAnAnswer("not_a_number", f"{shown(match.group())} has two signs")
    sign = 1.0 if (match["sign"] or match["inner"] or "+") == "+" else -1.0
    scale = SCALES[match["scale"].lower()] if match["scale"] else 0
    if match["number"] or match["braces"] or match["power"]:
        value = _finite(_with_exponent(match, scale))
    else:
        above = _finite(match["above"] or match["left"] or match["over"])
        below = _finite(match["below"] or match["right"] or match["under"])
        if below == 0:
            raise NotAnAnswer("not_finite", f"{shown(match.group())} divides by zero")
        value = (above / below + (_finite(match["whole"]) if match["whole"] else 0.0)) * 10.0**scale
    value = sign * value / (100.0 if match["percent"] and not percent_is_unit else 1.0)
    if not math.isfinite(value):
        raise NotAnAnswer("not_finite", shown(match.group()))
    return value


def _with_exponent(match: re.Match, scale: int) -> str:
    """Digits with at most one power of ten: by e, by "x 10^", or by a scale."""
    number = match["number"] or "1"
    powers = [power for name in ("braced", "bare", "braces", "power") if (power := match[name])]
    powers += [str(scale)] if scale else []
    if len(powers) + ("e" in number.lower()) > 1:
        raise NotAnAnswer("not_a_number", shown(match.group()))
    return number + (f"e{powers[0]}" if powers else "")


def _glued(before: str, after: str) -> bool:
    """Whether letters touch the number, as in x2 or 3rd: then it is a part of a word."""
    return before[-1:].isalnum() or after[:1].isalnum()


def _cleaned(text: str) -> str:
    text = re.sub(r"\\(?:text|textrm|textbf|mathrm|mathbf|mathit|rm)\s?\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\*\*|\\[()\[\]]", " ", text)  # emphasis and mathematics within a line
    # Thousands, as TeX writes them.
    text = re.sub(r"(?<=[0-9])(?:\{,\}|,\\!|\\[,! ])(?=[0-9]{3}(?![0-9]))", ",", text)
    return _unit_form(re.sub(r"\\[,;:! ]", " ", text)).rstrip(".").strip()
