"""The language rule: what is prose, what it says about scripts, and how the penalty grows."""

import time

import pytest

from megatron_vl.rl.rewards.language import language_penalty, scripts

ENGLISH = "How many of the blocks in this picture are red and stand on top of another block?"
CHINESE = "图片中有多少个红色的积木放在另一个积木上面？请仔细观察并说明你的理由。"
JAPANESE = "この絵の中で、ほかの積み木の上に置かれている赤い積み木はいくつありますか。"
RUSSIAN = "Сколько красных кубиков на этой картинке стоит на другом кубике? Объясните свой ответ подробно."


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (ENGLISH, ENGLISH * 2, 0.0),
        (ENGLISH, CHINESE * 2, 1.0),
        (ENGLISH, RUSSIAN * 2, 1.0),
        (CHINESE, ENGLISH * 2, 1.0),
        (CHINESE, CHINESE * 2, 0.0),
        (CHINESE, JAPANESE * 2, pytest.approx(0.75, abs=0.25)),
        (JAPANESE, JAPANESE * 2, 0.0),
        (ENGLISH, "Number 3.", 0.0),  # too short to tell
        ("", CHINESE * 3, 0.0),
        (ENGLISH[:40] + CHINESE[:20], CHINESE * 3, 0.0),  # the prompt mixes
        (
            CHINESE,
            CHINESE * 2 + r"$\text{height} = \frac{1}{2} base$ `for x in range(10): print(x)`" * 10,
            0.0,
        ),
        (ENGLISH, ENGLISH * 2 + ' The sign says "' + CHINESE + '".', 0.0),
    ],
)
def test_penalty(prompt, response, expected):
    assert language_penalty(prompt, response) == expected


def test_the_penalty_grows_with_the_share():
    penalties = [language_penalty(ENGLISH, ENGLISH * 2 + CHINESE * number) for number in range(6)]
    assert penalties[0] == 0.0 and penalties == sorted(penalties) and 0.0 < penalties[2] < penalties[5] < 1.0


def test_what_is_no_prose():
    text = "one ```code two``` $math three$ \\frac{four}{five} “six” https://seven.example eight"
    assert scripts(text) == {"LATIN": 2}


def test_unclosed_marks_cost_little():
    started = time.process_time()
    for mark in ("$$", r"\(", r"\[", '"', "“", "`", "$", "「", "\\frac{"):
        scripts((mark + "a ") * 30_000)
    assert time.process_time() - started < 10.0
