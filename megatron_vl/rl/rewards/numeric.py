"""Numbers: with tolerance and units, and counts. Numbers are read by an own grammar, never evaluated."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from megatron_vl.rl.rewards.extract import Extracted
from megatron_vl.rl.rewards.verdict import NotAnAnswer, Ok, shown

MAX_DIGITS = 32  # characters of one number
# fmt: off
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_FLOAT = rf"{_PLAIN}(?:[eE][+-]?[0-9]+)?"
_TENS = r"\s*(?:\\times|\\cdot|\u00d7|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<braced>[+-]?[0-9]+)\s*\}|(?P<bare>[+-]?[0-9]+))"
NUMBER = re.compile(
    r"(?:(?P<sign>[+-])\s*)?(?:"
    rf"\\[dt]?frac\s*\{{\s*(?P<above>[+-]?{_PLAIN})\s*\}}\s*\{{\s*(?P<below>[+-]?{_PLAIN})\s*\}}"
    rf"|(?:(?P<whole>[0-9]+)\s+)?(?P<left>{_PLAIN})\s*/\s*(?P<right>{_PLAIN})"
    rf"|(?P<number>{_FLOAT})(?:{_TENS})?"
    r")(?P<percent>\s*\\?%)?",
)
_NOT_FINITE = re.compile(r"(?i)(?<![a-z])(?:nan|inf|infinity)(?![a-z])|\\infty|\u221e")
_HEDGE = re.compile(
    r"(?i)\b(?:or|not|no|never|between|about|around|approximately|roughly|least|most|less|more|than|to|maybe|either)\b"
    r"|[<>\u2264\u2265\u00b1~\u2248^!\u221a+*/=|\\]|或"
)
_CURRENCY = re.compile(r"^\\?[$€£¥]\s*(?=[+-]?[0-9.])")


def score_numeric(
    gold: float, abs_tolerance: float, rel_tolerance: float, units: Sequence[str], answer: Extracted
) -> Ok:
    """1 if |answer - gold| <= max(abs_tolerance, rel_tolerance * |gold|), else 0.

    units: spellings that may follow the number and are ignored; with "%" among them a percent sign is one of these,
    otherwise it divides by 100. Raises NotAnAnswer: see `read_number`.
    """
    value = read_number(answer, units)
    return Ok(float(abs(value - gold) <= max(abs_tolerance, rel_tolerance * abs(gold))))


def score_count(gold: int, answer: Extracted) -> Ok:
    """1 if the answer is the whole number `gold`, as digits or as an English word up to twenty, else 0.

    A number that is not whole or below 0 is no count. Raises NotAnAnswer (`not_a_count`, and as `read_number`).
    """
    word = answer.text.rstrip(".").lower()
    value = float(WORDS.index(word)) if word in WORDS else read_number(answer, ())
    if value < 0 or value != int(value):
        raise NotAnAnswer("not_a_count", f"{value:g} is not a number of things")
    return Ok(float(value == gold))


def read_number(answer: Extracted, units: Sequence[str]) -> float:
    r"""The one number of an answer.

    In a `\boxed{}` nothing but the number, a currency sign and a unit may stand; in a line there may be words around
    it, but no second number and none that hedges ("about 5", "5 or 6", "not 5"). Raises NotAnAnswer (`not_finite`,
    `several_answers`, `not_a_number`, `hedged`, `number_too_long`).
    """
    text = _cleaned(answer.text)
    if _NOT_FINITE.search(text):
        raise NotAnAnswer("not_finite", shown(answer.text))
    whole = NUMBER.fullmatch(_without_unit(text, units))
    if whole:
        return _value(whole, "%" in units)
    found = list(NUMBER.finditer(text))
    if answer.boxed or not found:
        reason = "several_answers" if len({match.group() for match in found}) > 1 else "not_a_number"
        raise NotAnAnswer(reason, f"{shown(answer.text)} is not one number")
    values = {_value(match, "%" in units) for match in found}
    if len(values) > 1:
        raise NotAnAnswer("several_answers", f"{len(values)} numbers in {shown(answer.text)}")
    around = NUMBER.sub(" ", text)
    for unit in units:
        around = around.replace(unit, " ")
    if _HEDGE.search(around) or any(_glued(text, match) for match in found):
        raise NotAnAnswer("hedged", f"{shown(answer.text)} says more than a number")
    return values.pop()


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
    sign = -1.0 if match["sign"] == "-" else 1.0
    if match["number"]:
        value = _finite(match["number"] + ("" if not _power(match) else f"e{_power(match)}"))
    else:
        above = _finite(match["above"] or match["left"])
        below = _finite(match["below"] or match["right"])
        if below == 0:
            raise NotAnAnswer("not_finite", f"{shown(match.group())} divides by zero")
        value = above / below + (_finite(match["whole"]) if match["whole"] else 0.0)
    value = sign * value / (100.0 if match["percent"] and not percent_is_unit else 1.0)
    if not math.isfinite(value):
        raise NotAnAnswer("not_finite", shown(match.group()))
    return value


def _power(match: re.Match) -> str:
    power = match["braced"] or match["bare"] or ""
    if power and "e" in match["number"].lower():
        raise NotAnAnswer("not_a_number", shown(match.group()))
    return power


def _glued(text: str, match: re.Match) -> bool:
    """Whether letters touch the number, as in x2 or 3rd: then it is a part of a word."""
    before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
    return before.isalnum() or before == "." or after.isalpha()


def _cleaned(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|rm)\s?\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(
        r"(?<=[0-9])(?:\{,\}|,\\!|\\[,!])(?=[0-9]{3}(?![0-9]))", ",", text
    )  # thousands, as TeX writes them
    text = re.sub(r"\\[,;:! ]", " ", text)
    return _CURRENCY.sub("", text.strip()).rstrip(".").strip()


def _without_unit(text: str, units: Sequence[str]) -> str:
    for unit in sorted(units, key=len, reverse=True):
        if unit != "%" and text.endswith(unit):
            return text.removesuffix(unit).strip()
    return text
