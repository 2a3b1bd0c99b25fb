"""Normalisation and hashes of words."""

import numpy as np
import pytest

from megatron_vl.data.curate.words import WordStream, normalize, signs, split_words, word_hashes


@pytest.mark.parametrize(
    "variant",
    [
        "the  caf\u00e9\tSTRASSE\nfish 12",
        "The cafe\u0301 stra\u00dfe fish 12",
        "\uff34he caf\u00e9 stra\u00dfe \ufb01sh \uff11\uff12",
        "\u201cthe\u201d caf\u00e9, stra\u00dfe \u2014 fish\u00a012!",
        "t\u00adhe caf\u200b\u00e9 stra\u00dfe fish\ufeff 12",
        "<image> the caf\u00e9 <image 1> stra\u00dfe fish <object:3> 12",
    ],
)
def test_variants_have_the_same_words(variant):
    assert split_words(normalize(variant)) == ["the", "caf\u00e9", "strasse", "fish", "12"]


@pytest.mark.parametrize(
    "different", ["the caf\u00e9 strasse fish 13", "the cafe strasse fish 12", "thecaf\u00e9 strasse fish 12"]
)
def test_other_words_stay_different(different):
    assert split_words(normalize(different)) != ["the", "caf\u00e9", "strasse", "fish", "12"]


def test_scripts_without_spaces_count_characters():
    assert split_words(normalize("图像abc の猫")) == ["图", "像", "abc", "の", "猫"]


def test_signs_that_stand_for_capitals_are_folded_too():
    assert split_words(normalize("\u2121 acme\u2122")) == ["tel", "acmetm"]


def test_signs_tell_sums_from_differences_but_not_mark_up():
    assert [
        signs(normalize(text)) for text in ("3 + 4", "3 - 4", "3 \u2212 4", "**3** -- 4", "well-known")
    ] == [
        "+",
        "-",
        "-",
        "",
        "",
    ]


def test_windows_do_not_depend_on_their_place():
    values = word_hashes([f"w{number % 7}" for number in range(3000)])
    windows = WordStream.of(values).windows(64)
    assert len(windows) == 3000 - 63
    assert np.array_equal(windows[:-7], windows[7:]) and len(np.unique(windows)) == 7
    alone = WordStream.of(values[1500:1564]).windows(64)
    assert alone[0] == windows[1500]


def test_windows_agree_with_the_sum_they_stand_for():
    values = word_hashes(["a", "b", "c"])
    base, whole = 0x9E3779B97F4A7C15, 1 << 64
    by_hand = (sum(int(value) * base**place for place, value in enumerate(values[1:])) + 2 * base) % whole
    assert int(WordStream.of(values).windows(2)[1]) == by_hand


def test_hashes_are_the_same_in_every_process():
    assert int(word_hashes(["word"])[0]) == 0x958EC7D727CFA44A  # BLAKE2b-64 of "word", low byte first
    assert WordStream.of(word_hashes([])).windows(5).tolist() == []
