r"""Where the answer of a response stands: after the last `</think>`, in the last balanced `\boxed{}`.

Every verifier sees only what these functions return, so that nothing written while thinking can be scored and no
verifier meets a text that is longer than it is made for. Rules (ours): rl.md of the design asks for them because
public verifiers that search the whole text accept `\boxed{12}` from the thinking and "5 or 6" for 5.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from megatron_vl.data.special_tokens import LITERALS
from megatron_vl.rl.rewards.verdict import NotAnAnswer, shown

MAX_ANSWER = 512  # characters of a short answer
MAX_STRUCTURED = 4096  # of coordinates and JSON

THINK, END_THINK = LITERALS["think_start"], LITERALS["think_end"]
_STOPS = (LITERALS["chat_end"], LITERALS["endoftext"])

# Powers and indices are lost by NFKC ("10²" would become "102"), so they are spelled out first.
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-"))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-"))
_SCRIPTS = re.compile(f"[{''.join(_RAISED)}]+|[{''.join(_LOWERED)}]+")
_FRACTION_AFTER_DIGIT = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])")
_SAME = str.maketrans(
    {**dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2796", "-"), "\u2044": "/", "。": ".", "、": ","}
)
_BRACES = re.compile(r"\\boxed\s*\{|\\boxed|\\[\\{}]|[{}]")
# Neither the last of several full stops nor the bracket that LaTeX does not show.
_STOP = re.compile(r"(?<![.])(?<!\\left)(?<!\\right)\.$")
_CUE = re.compile(
    r"(?:\banswer\b\*{0,2}(?:\s{1,4}is\b|\s{0,4}[:=])|答案(?:是|为|:)):?\s{0,8}(?P<rest>\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Extracted:
    r"""A short answer. text: normalised, at most MAX_ANSWER characters. boxed: whether it stood in a `\boxed{}`."""

    text: str
    boxed: bool


def split_thinking(text: str, thinking: bool) -> tuple[str, str]:
    """(reasoning, answer) of a response: what stands before and after the last `</think>`.

    thinking: whether the response must think; its `<think>` may stand in the prompt. Raises NotAnAnswer
    (`unclosed_think`, `no_answer`).
    """
    for stop in _STOPS:
        text = text.removesuffix(stop)
    before, end, answer = text.rpartition(END_THINK)
    if THINK in answer or (thinking and not end):
        raise NotAnAnswer("unclosed_think", f"no {END_THINK} ends the thinking")
    if not answer.strip():
        raise NotAnAnswer("no_answer", f"nothing follows {END_THINK}" if end else "the response is empty")
    return before, answer


def normalise(text: str) -> str:
    """NFKC without its traps: powers, indices and mixed fractions keep their meaning, dashes become minus signs,
    decimal digits of any script ASCII ones, and invisible characters vanish. Look-alike letters stay what they are.
    """
    text = _SCRIPTS.sub(_spelled, text)
    text = unicodedata.normalize("NFKC", _FRACTION_AFTER_DIGIT.sub(" ", text)).translate(_SAME)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_plain(char) for char in text)


def boxes(text: str) -> list[str]:
    r"""Contents of all `\boxed{}` in order. One pass, whatever the nesting.

    Raises NotAnAnswer (`unbalanced_box`, `nested_box`).
    """
    found: list[str] = []
    open_braces: list[bool] = []  # whether each one belongs to a box
    start = -1  # of the content of the open box
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == r"\boxed":
            raise NotAnAnswer("unbalanced_box", r"\boxed without a brace")
        if token.startswith(r"\boxed"):
            if start >= 0:
                raise NotAnAnswer("nested_box", r"a \boxed{} inside another")
            start = match.end()
            open_braces.append(True)
        elif token == "{":
            open_braces.append(False)
        elif token == "}" and open_braces and open_braces.pop():
            found.append(text[start : match.start()])
            start = -1
    if start >= 0:
        raise NotAnAnswer("unbalanced_box", r"a \boxed{ that is not closed")
    return found


def short_answer(answer: str, need_box: bool) -> Extracted:
    r"""The one short answer of what follows the thinking.

    Taken from the `\boxed{}`; without any (and `need_box` false) from the line that says "answer is" or "answer:",
    or from the only line. Several that differ are refused, whichever is right. Raises NotAnAnswer
    (`unbalanced_box`, `nested_box`, `no_box`, `no_answer`, `several_answers`, `too_long`).
    """
    answer = normalise(answer)
    found = boxes(answer)
    if not found and need_box:
        raise NotAnAnswer("no_box", r"the answer must stand in \boxed{}")
    candidates = found or [match.group("rest") for match in _CUE.finditer(answer)]
    if not candidates:
        candidates = [line for line in answer.splitlines() if line.strip()]
        if len(candidates) > 1:
            raise NotAnAnswer("no_answer", r"several lines, none with \boxed{} or 'answer:'")
    candidates = [_stripped(candidate) for candidate in candidates]
    if len({re.sub(r"\s+", "", candidate) for candidate in candidates}) > 1:
        raise NotAnAnswer("several_answers", f"{shown(candidates[0])} and {shown(candidates[-1])}")
    text = _capped(candidates[-1], MAX_ANSWER) if candidates else ""
    if not text:
        raise NotAnAnswer("no_answer", "the answer is empty")
    return Extracted(text, boxed=bool(found))


def without_stop(text: str) -> str:
    """Without the full stop that ends a sentence."""
    return _STOP.sub("", text).rstrip()


def structured_answer(answer: str) -> str:
    r"""The text that holds coordinates or JSON: the content of the one `\boxed{}`, else all that follows the thinking.

    It is taken as it stands; `normalise` it for coordinates, not for JSON, whose strings are typed. Raises NotAnAnswer
    (`unbalanced_box`, `nested_box`, `several_answers`, `too_long`).
    """
    found = boxes(answer)
    if len(set(found)) > 1:
        raise NotAnAnswer("several_answers", f"{len(found)} boxes")
    return _capped((found[-1] if found else answer).strip(), MAX_STRUCTURED)


def _stripped(text: str) -> str:
    """Without white space, Markdown emphasis and mathematics delimiters around it, and the full stop at its end."""
    while True:
        before, text = text, without_stop(text.strip()).strip("*`").strip()
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inner = text[len(left) : len(text) - len(right)]
            if (
                text.startswith(left)
                and text.endswith(right)
                and len(text) > len(left)
                and right not in inner
            ):
                text = inner
        if text == before:
            return text


def _capped(text: str, limit: int) -> str:
    if len(text) > limit:
        raise NotAnAnswer("too_long", f"{len(text)} characters, at most {limit}")
    return text


def _spelled(match: re.Match) -> str:
    sign, table = ("^", _RAISED) if match.group()[0] in _RAISED else ("_", _LOWERED)
    return f"{sign}{{{''.join(table[char] for char in match.group())}}}"


def _plain(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.digit(char))
    if category == "Cf" or (category == "Cc" and char not in "\n\t\r"):
        return ""
    return char
