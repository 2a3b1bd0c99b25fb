"""Verifiers of short answers that are compared as text: exact match and multiple choice."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_vl.rl.rewards.extract import Extracted, normalise
from megatron_vl.rl.rewards.verdict import NotAnAnswer, Ok, shown

_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|emph|mathrm|mathbf|mathit|boldsymbol|mathsf)\s?\{([^{}]*)\}"
)
_ESCAPED = re.compile(r"\\([%$&#_])")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_ALONE = re.compile(r"(?i:(?:option|choice)\s+)?[(\[\u3010]?([A-Za-z])[)\]\u3011]?[.:]?")
# A small letter needs a bracket, a full stop or nothing after it: "a cat" does not choose A.
_FIRST_LETTER = re.compile(
    r"(?i:(?:option|choice)\s+)?[(\[\u3010]?(?:(?P<letter>[A-Za-z])(?:[)\]\u3011]|[.:](?=\s|$)|$)|(?P<capital>[A-Z])(?=[\s,.:-]))[.:,-]?\s*(?P<rest>.*)",
    re.DOTALL,
)
_SEVERAL = re.compile(r"\(?[A-Z]\)?(?:\s*(?:,|;|&|/|\band\b|,\s*and\b|和)?\s*\(?[A-Z]\)?)+\.?")
_LETTER = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")


def exact_form(text: str, case_sensitive: bool) -> str:
    """What is compared: NFKC, one space for any white space, straight quotation marks, no full stop at the end, LaTeX's
    \\text{} and \\% as plain text, case folded by default."""
    text = _ESCAPED.sub(r"\1", _WRAPPED.sub(r"\1", normalise(text))).translate(_QUOTES)
    text = " ".join(text.split()).rstrip(".").rstrip()
    return text if case_sensitive else text.casefold()


def score_exact(accepted: Sequence[str], case_sensitive: bool, answer: Extracted) -> Ok:
    """1 if the answer is one of the accepted texts, else 0."""
    given = exact_form(answer.text, case_sensitive)
    return Ok(float(any(given == exact_form(text, case_sensitive) for text in accepted)))


def score_choice(gold: frozenset[str], choices: Sequence[str], answer: Extracted) -> Ok:
    """1 if the letters of the answer are exactly those of `gold`, else 0.

    gold: letters A, B, ... choices: texts of the options in order, so that an answer may also be the text of one or
    "B. its text"; a letter of an option that stands alone is that letter, whatever the texts are. Raises NotAnAnswer
    (`no_choice`, `several_answers`, `contradiction`, `extra_text`).
    """
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    texts = dict(zip(letters, (exact_form(choice, False) for choice in choices)))
    given = chosen_letters(_WRAPPED.sub(r"\1", answer.text).strip(), texts, many=len(gold) > 1)
    return Ok(float(given == gold))


def chosen_letters(text: str, texts: dict[str, str], many: bool) -> frozenset[str]:
    """The letters that an answer names. texts: letter -> text of the option, in `exact_form`.

    many: whether a question asks for several. Raises NotAnAnswer: see `score_choice`.
    """
    alone = _ALONE.fullmatch(text)
    if alone and alone[1].upper() in texts:
        return frozenset([alone[1].upper()])
    by_text = [letter for letter, option in texts.items() if option == exact_form(text, False)]
    if len(by_text) == 1:
        return frozenset(by_text)
    if many and (_SEVERAL.fullmatch(text) or re.fullmatch(r"[A-Z]{2,26}\.?", text)):
        return frozenset(_known(letter, texts) for letter in re.findall(r"[A-Z]", text))
    match = _FIRST_LETTER.fullmatch(text)
    if not match:
        several = _LETTER.findall(text)
        reason = "several_answers" if len(set(several) & set(texts)) > 1 else "no_choice"
        raise NotAnAnswer(reason, f"{shown(text)} does not begin with the letter of an option")
    letter = _known((match["letter"] or match["capital"]).upper(), texts)
    rest = exact_form(match["rest"], False)
    if len(rest) == 1 and rest.upper() in set(texts) - {letter} and match["capital"]:
        raise NotAnAnswer("several_answers", f"the letters {letter} and {rest.upper()}")
    if rest and rest != texts[letter]:
        if rest in texts.values():
            raise NotAnAnswer("contradiction", f"option {letter} with the text of another")
        if texts[letter] in (rest.lstrip(":- "), rest.removeprefix("(").removesuffix(")")):
            return frozenset([letter])
        others = (set(_LETTER.findall(match["rest"])) & set(texts)) - {letter}
        raise NotAnAnswer(
            "several_answers" if others else "extra_text",
            f"{shown(match['rest'])} follows the letter {letter}",
        )
    return frozenset([letter])


def _known(letter: str, texts: dict[str, str]) -> str:
    if letter not in texts:
        raise NotAnAnswer("no_choice", f"there is no option {letter}, only {', '.join(texts)}")
    return letter
