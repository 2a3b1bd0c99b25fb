r"""Verifier of mathematical answers: the content of the `\boxed{}`, compared by `math-verify` in another process."""

from __future__ import annotations

import re

from megatron_vl.rl.rewards.extract import Extracted, normalise, without_stop
from megatron_vl.rl.rewards.math_pool import (
    DIFFERENT,
    EQUAL,
    NO_ANSWER,
    NO_GOLD,
    MathPool,
)
from megatron_vl.rl.rewards.numeric import SCALES
from megatron_vl.rl.rewards.verdict import BAD_GOLD, NotAnAnswer, Ok, VerifierError, shown

MAX_DEPTH = 24  # of brackets; the parser's time grows exponentially with them
_HOSTILE = re.compile(
    r"\^\s*\{?\s*[0-9]+\s*\^\s*\{?\s*[0-9]+\s*\^"  # a tower of four numbers
    r"|\^\s*\{?\s*-?[0-9]{5,}"  # a power above 9999
    r"|[0-9]{5,}\s*!|!\s*!\s*!"  # a factorial that sympy would write out
)
# Signs that the parser does not read, as LaTeX.
_SIGNS = str.maketrans(
    {
        "\u00b0": r"^{\circ}",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u00f7": r"\div ",
        "\u221e": r"\infty ",
        "\u222a": r"\cup ",
        "\u2229": r"\cap ",
        "\u2208": r"\in ",
    }
)
_ROOTS = {"\u221a": "", "\u221b": "[3]", "\u221c": "[4]"}
_ROOT = re.compile(
    rf"([{''.join(_ROOTS)}])\s*"
    r"(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\[A-Za-z]+))"
)
# 12 000, which the parser takes for 12 times 0.
_SPACED = re.compile(r"(?<![0-9A-Za-z.,\\}^_])[0-9]{1,3}(?:(?:\\[,:;! ]| )[0-9]{3})+(?![0-9])")
# 2 1/2, which it takes for a sum.
_MIXED = re.compile(r"(?<![0-9A-Za-z.,/\\}^_])([0-9]+) +([0-9]+)/([0-9]+)(?![0-9.])")
# \mathbf{5}, which it takes for a letter.
_STYLED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol|bm)\s*\{\s*([+-]?[0-9.,]*[0-9])\s*\}")
# 5 million, of which it reads the 5.
_SCALED = re.compile(
    rf"(?<=[0-9])\s*(?:\\[,;: ])*(?:\\text\s*\{{\s*)?({'|'.join((*SCALES, 'dozen'))})\b(?:\s*\}})?"
)


def latex(text: str) -> str:
    """The text as the parser reads it, for answers and gold answers alike: normalised, without the full stop that ends
    it; signs such as √ and °, mixed numbers, thousands between spaces and bold numbers are written as LaTeX."""
    text = without_stop(normalise(text).strip())
    text = _SPACED.sub(lambda match: re.sub("[^0-9]", "", match[0]), _STYLED.sub(r"\1", text))
    text = _SCALED.sub(_scale, text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _ROOT.sub(lambda match: rf"\sqrt{_ROOTS[match[1]]}{{{match[2] or match[3] or match[4]}}}", text)
    return text.translate(_SIGNS)


def _scale(match: re.Match) -> str:
    return rf" \times 10^{{{SCALES[match[1]]}}}" if match[1] in SCALES else r" \times 12"


def score_math(gold: str, answer: Extracted, pool: MathPool) -> Ok | VerifierError:
    """1 if the answer is the same mathematics as `gold`, else 0. gold: by `latex`.

    Raises NotAnAnswer (`not_mathematics`, `hostile`: an expression that nobody means and that would only use up the
    time-out, unless the gold answer is one, too).
    """
    given = latex(answer.text)
    if too_much(given) and not too_much(gold):
        raise NotAnAnswer("hostile", shown(answer.text))
    result = pool.compare(gold, given)
    if result.status in (EQUAL, DIFFERENT):
        return Ok(float(result.status == EQUAL))
    if result.status == NO_ANSWER:
        raise NotAnAnswer("not_mathematics", shown(answer.text))
    if result.status == NO_GOLD:
        return VerifierError(BAD_GOLD, f"the gold answer {shown(gold)} is no mathematics in LaTeX")
    return VerifierError(f"math_{result.status}", result.detail or shown(answer.text))


def too_much(text: str) -> bool:
    """Whether a short text stands for a number that cannot be written out, or nests beyond sense."""
    level = deepest = 0
    for char in text:
        level += (char in "([{") - (char in ")]}")
        deepest = max(deepest, level)
    return deepest > MAX_DEPTH or bool(_HOSTILE.search(text))
