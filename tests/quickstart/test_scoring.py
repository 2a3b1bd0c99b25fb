"""Scoring: exact match, best constants, the swap that leaves chance, the table and its checks."""

import random

import pytest
import questions
import scoring


def heldout() -> tuple[list[str], list[str]]:
    pairs = [pair for picture in questions.make_pictures(1200, True, "s") for pair in picture.asked]
    return [kind for kind, _ in pairs], [answer for _, answer in pairs]


@pytest.mark.parametrize(
    ("predicted", "targets", "right"),
    [
        ([9, 9, 4, 5, 9], [-100, -100, 4, 5, -100], True),
        ([9, 9, 4, 6, 9], [-100, -100, 4, 5, -100], False),
        ([9, 9, 3, 5, 9], [-100, -100, 4, 5, -100], False),
        ([0], [0], True),
    ],
)
def test_exact_match(predicted, targets, right):
    assert scoring.exact_match(predicted, targets) is right


def test_exact_match_equals_greedy_decoding():
    """Against real greedy decoding of a random next-token table that looks at the last two tokens."""
    rng = random.Random(0)
    table = {(a, b): rng.randrange(3) for a in range(3) for b in range(3)}
    agree = {True: 0, False: 0}
    for _ in range(300):
        prompt, answer = [rng.randrange(3) for _ in range(2)], [rng.randrange(3) for _ in range(3)]
        decoded = list(prompt)
        for _ in answer:
            decoded.append(table[decoded[-2], decoded[-1]])
        tokens = prompt + answer
        predicted = [0] + [table[tokens[i - 1], tokens[i]] for i in range(1, len(tokens) - 1)]
        targets = [-100] + tokens[2:]
        right = scoring.exact_match(predicted, targets)
        assert right == (decoded[2:] == answer)
        agree[right] += 1
    assert min(agree.values()) > 3


def test_exact_match_refuses_what_cannot_be_scored():
    with pytest.raises(ValueError, match="no scored position"):
        scoring.exact_match([1, 2], [-100, -100])
    with pytest.raises(ValueError, match="2 predictions for 3 targets"):
        scoring.exact_match([1, 2], [1, 2, 3])


def test_swapped_pictures_leave_exactly_chance_to_a_model_that_reads_them():
    types, answers = heldout()
    partners = scoring.swap_partners(types, answers)
    assert sorted(partners) == list(range(len(types)))
    assert all(index != partner for index, partner in enumerate(partners))
    assert all(types[index] == types[partner] for index, partner in enumerate(partners))
    constants = scoring.best_constants(types, answers)
    for kind, (_, most) in constants.items():
        members = [index for index, other in enumerate(types) if other == kind]
        matches = sum(answers[index] == answers[partners[index]] for index in members)
        assert matches == (most if kind != "box" else 0), kind
    assert partners == scoring.swap_partners(types, answers)


def test_swapped_pictures_leave_about_chance_to_models_in_between():
    """A model that sometimes reads the picture and else guesses, also one that favours an answer."""
    types, answers = heldout()
    partners = scoring.swap_partners(types, answers)
    constants = scoring.best_constants(types, answers)
    chance = sum(most for _, most in constants.values()) / len(types)
    for reads in (0.0, 0.3, 0.7):
        rng = random.Random(reads)
        seen = [a if rng.random() < reads else constants[k][0] for k, a in zip(types, answers)]
        swapped = sum(seen[partner] == answers[index] for index, partner in enumerate(partners)) / len(types)
        assert swapped == pytest.approx(chance, abs=0.02)


def test_swapping_needs_a_second_picture():
    with pytest.raises(ValueError, match="one question of type 'word'"):
        scoring.swap_partners(["word"], ["cat"])


TYPES = ["colour"] * 8 + ["count"] * 2
ANSWERS = ["red", "blue", "green", "pink", "cyan", "yellow", "purple", "orange", "1", "2"]


def columns(after: int, swapped: int, blind: int, before: int = 0) -> dict[str, list[bool]]:
    counts = {"before": before, "after": after, "swapped": swapped, "no image": blind}
    return {name: [index < count for index in range(10)] for name, count in counts.items()}


def test_table():
    rows = scoring.build_table(TYPES, ANSWERS, columns(after=9, swapped=2, blind=2))
    assert [(row.kind, row.number, row.constant) for row in rows] == [
        ("colour", 8, 0.125),
        ("count", 2, 0.5),
        ("overall", 10, 0.2),
    ]
    assert rows[1].shares == {"before": 0.0, "after": 0.5, "swapped": 0.0, "no image": 0.0}
    assert scoring.format_table(rows).splitlines() == [
        "type     questions  best constant  before    after  swapped  no image",
        "---------------------------------------------------------------------",
        "colour           8         12.5 %   0.0 %  100.0 %   25.0 %    25.0 %",
        "count            2         50.0 %   0.0 %   50.0 %    0.0 %     0.0 %",
        "---------------------------------------------------------------------",
        "overall         10         20.0 %   0.0 %   90.0 %   20.0 %    20.0 %",
    ]
    with pytest.raises(ValueError, match="column 'after' has 1 entries for 10 questions"):
        scoring.build_table(TYPES, ANSWERS, {"after": [True]})


@pytest.mark.parametrize(
    ("numbers", "passed"),
    [
        ({"after": 9, "swapped": 2, "blind": 2}, [True, True, True, True]),
        ({"after": 3, "swapped": 2, "blind": 2}, [True, False, True, True]),
        ({"after": 1, "swapped": 2, "blind": 2}, [False, False, True, True]),
        ({"after": 9, "swapped": 4, "blind": 2}, [True, True, True, False]),
        ({"after": 9, "swapped": 2, "blind": 2, "before": 2}, [True, True, False, True]),
    ],
)
def test_checks(numbers, passed):
    checks = scoring.check_table(scoring.build_table(TYPES, ANSWERS, columns(**numbers)))
    assert [check.passed for check in checks] == passed
    assert "swapped images" in checks[3].text
