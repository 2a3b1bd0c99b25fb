"""Degenerate text: a hit and a near miss for every rule."""

import json

import pytest

from megatron_vl.data.curate.rules import DegenerateText
from megatron_vl.data.curate.text_rules import (
    find_bad_answer,
    find_degenerate_text,
    find_repetition,
    longest_character_run,
)
from megatron_vl.data.sample import parse_sample
from tests.data.curate.made import chat, text, words

RULE = DegenerateText()


def reason(value: str) -> str | None:
    found = find_repetition(value, RULE)
    return found.reason if found else None


def lines(different: int, repeated: int) -> str:
    return "\n".join([f"line {text(2, number)}" for number in range(different)] + ["again"] * repeated)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a" * 257, "character_run"),
        ("a" * 256, None),
        ("x" + " " * 1000 + "y", None),  # white space may be long
        ("字" * 300, "character_run"),
        (lines(5, 6), None),  # 5 of 11 repeat
        (lines(4, 6), None),  # 5 of 10: at the limit
        (lines(4, 7), "repeated_lines"),  # 6 of 11
        (lines(1, 7), None),  # too few lines to judge
        (" ".join(words(12, 1) * 8), "repeated_ngrams"),
        (" ".join(words(100, 1) + words(100, 1)), None),  # 93 of 193 n-grams
        (" ".join(words(40, 1) + words(20, 2)[:5]), None),
        (" ".join(words(1000, 1) + words(10, 2) * 10), "looping_end"),
        (" ".join(words(1000, 1) + words(10, 2) * 9), None),  # 90 words of loop, 96 are needed
        (" ".join(words(1000, 1) + words(60, 2) * 3), "looping_end"),
        (" ".join(words(1000, 1) + words(60, 2) * 2), None),  # once more is no loop
        (" ".join(words(1000, 1) + words(10, 2) * 10 + words(10, 3)), None),  # it went on
        ("", None),
        ("good " * 20, None),  # too short to judge
    ],
)
def test_repetition(value, expected):
    assert reason(value) == expected


def test_a_loop_that_is_cut_in_the_middle_is_found():
    looping = words(1000, 1) + (words(30, 2) * 6)[:-11]
    assert reason(" ".join(looping)) == "looping_end"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>a</think>b", None),
        ("a</think>b", None),  # the opening tag stood in the prompt
        ("<think>a", "unclosed_think"),
        ("<think>a<think>b</think>c", "unclosed_think"),
        ("<think>a</think>b</think></think>", "unclosed_think"),
        ("<think>a</think>  \n", "empty_answer"),
        (" \n\t", "empty_answer"),
        ("```python\nx = 1", "truncated_answer"),
        ("```python\nx = 1\n```\ndone", None),
        ("inline ``` is no block", None),
        ("so \\boxed{\\frac{1}{2}", "truncated_answer"),
        ("so \\boxed{\\frac{1}{2}}", None),
        ("yes", None),
    ],
)
def test_answers(answer, expected):
    found = find_bad_answer(answer)
    assert (found.reason if found else None) == expected


def judge(record: dict, rule: DegenerateText = RULE) -> str | None:
    data = json.dumps(record).encode()
    found = find_degenerate_text(parse_sample(data, "x"), record, rule)
    return found and f"{found.reason} | {found.detail}"


def test_every_turn_is_judged_by_itself():
    fine = chat("question " + text(30, 1), text(80, 2), "a")
    assert judge(fine) is None
    broken = chat("question", " ".join(words(12, 1) * 8), "a")
    assert judge(broken).startswith("repeated_ngrams | turn 1 (assistant)")
    assert judge({"text": "z" * 300}).startswith("character_run | document")


def test_cut_off_answers_by_finish_reason_and_the_switch():
    assert judge({**chat("q", "a", "x"), "finish_reason": "length"}).startswith("truncated_answer")
    assert judge({**chat("q", "a", "x"), "finish_reason": "stop"}) is None
    assert judge(chat("q", "<think>", "x"), DegenerateText(check_answers=False)) is None
    assert judge(chat("<think>", "a", "x")) is None  # only answers are answers


def test_longest_run():
    assert longest_character_run("aabbbcc") == ("b", 3)
    assert longest_character_run("") == ("", 0) and longest_character_run("   ") == ("", 0)
