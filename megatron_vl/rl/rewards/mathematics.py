r"""Verifier of mathematical answers: the content of the `\boxed{}`, compared by `math-verify` in another process."""

from __future__ import annotations

import re

from megatron_vl.rl.rewards.extract import Extracted
from megatron_vl.rl.rewards.math_pool import (
    DIFFERENT,
    EQUAL,
    NO_ANSWER,
    NO_GOLD,
    MathPool,
)
from megatron_vl.rl.rewards.verdict import NotAnAnswer, Ok, VerifierError, shown

MAX_DEPTH = 24  # of brackets; the parser's time grows exponentially with them
_HOSTILE = re.compile(
    r"\^\s*\{?\s*[0-9]+\s*\^\s*\{?\s*[0-9]+\s*\^"  # a tower of four numbers
    r"|\^\s*\{?\s*-?[0-9]{5,}"  # a power above 9999
    r"|[0-9]{5,}\s*!|!\s*!\s*!"  # a factorial that sympy would write out
)


def score_math(gold: str, answer: Extracted, pool: MathPool) -> Ok | VerifierError:
    """1 if the answer is the same mathematics as `gold`, else 0.

    Raises NotAnAnswer (`not_mathematics`, `hostile`: an expression that nobody means and that would only use up the
    time-out, unless the gold answer is one, too).
    """
    if too_much(answer.text) and not too_much(gold):
        raise NotAnAnswer("hostile", shown(answer.text))
    result = pool.compare(gold, answer.text)
    if result.status in (EQUAL, DIFFERENT):
        return Ok(float(result.status == EQUAL))
    if result.status == NO_ANSWER:
        raise NotAnAnswer("not_mathematics", shown(answer.text))
    if result.status == NO_GOLD:
        return VerifierError("gold_not_mathematics", shown(gold))
    return VerifierError(f"math_{result.status}", result.detail or shown(answer.text))


def too_much(text: str) -> bool:
    """Whether a short text stands for a number that cannot be written out, or nests beyond sense."""
    level = deepest = 0
    for char in text:
        level += (char in "([{") - (char in ")]}")
        deepest = max(deepest, level)
    return deepest > MAX_DEPTH or bool(_HOSTILE.search(text))
