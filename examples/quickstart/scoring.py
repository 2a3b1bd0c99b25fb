"""How the quickstart scores a model: pure functions over token ids, answers and true/false lists.

Exact match from one teacher-forced pass.  A sample is right iff, at every scored position, the most
probable token is the target.  That is what greedy decoding gives: if the first token is right, decoding
continues from the same prefix as the teacher-forced pass, so its second choice is the same, and so on by
induction; at the first wrong token both have failed.  The end-of-turn token is a scored position too, so an
answer that would go on is wrong.

Three questions about a trained model, in columns: how well it does; how well with each picture replaced by
that of another question of the same type (``swap_partners``); how well without any picture.  A model that
looks at the pictures falls from the first to the third when they are swapped.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

IGNORED = -100
OVERALL = "overall"


def exact_match(predicted: Sequence[int], targets: Sequence[int]) -> bool:
    """Whether greedy decoding would give this answer.

    predicted: most probable token at each position, from a teacher-forced pass, length S.
    targets: what each position must predict, -100 where nothing is scored, length S.
    Raises ValueError for different lengths or if no position is scored: such a sample has no answer.
    """
    if len(predicted) != len(targets):
        raise ValueError(f"{len(predicted)} predictions for {len(targets)} targets")
    scored = [(guess, target) for guess, target in zip(predicted, targets) if target != IGNORED]
    if not scored:
        raise ValueError("no scored position: the sample has no answer")
    return all(guess == target for guess, target in scored)


def best_constants(types: Sequence[str], answers: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The most frequent answer of each type and how often it occurs, types in order of appearance."""
    tallies: dict[str, Counter] = {}
    for kind, answer in zip(types, answers):
        tallies.setdefault(kind, Counter())[answer] += 1
    return {kind: tally.most_common(1)[0] for kind, tally in tallies.items()}


def swap_partners(types: Sequence[str], answers: Sequence[str], seed: int = 0) -> list[int]:
    """For every question, whose picture it gets: a permutation within each type, nobody keeping theirs.

    Giving everybody a picture with another answer would push a model that sees below chance, and pictures
    with the same answer above.  So the permutation is drawn at random, which makes the answers of a
    question and of its new picture independent, and drawn again until as many of them agree as chance says:
    the sum of the squared shares of the answers, rounded.  A model that reads every picture correctly then
    scores exactly chance, as does one that knows only the prior; in between, chance is the expectation.
    """
    partners = list(range(len(types)))
    for kind in dict.fromkeys(types):
        members = [index for index, other in enumerate(types) if other == kind]
        if len(members) < 2:
            raise ValueError(f"one question of type {kind!r}: there is no other picture to give it")
        labels = [answers[index] for index in members]
        for index, other in zip(members, _shuffle_to_chance(labels, random.Random(f"{seed} {kind}"))):
            partners[index] = members[other]
    return partners


def _shuffle_to_chance(labels: list[str], rng: random.Random) -> list[int]:
    """A permutation of range(len(labels)) without fixed points whose label agreements are at chance."""
    number = len(labels)
    wanted = round(sum(count * count for count in Counter(labels).values()) / number)
    if max(Counter(labels).values()) == 1:
        wanted = 0  # all different: nothing can agree with anything but itself
    best: list[int] = []
    best_miss = number + 1
    for _ in range(1000):
        # Each element goes to the next one of a random cycle, so nothing stays where it was.
        cycle = rng.sample(range(number), number)
        permutation = [0] * number
        for here, there in zip(cycle, cycle[1:] + cycle[:1]):
            permutation[here] = there
        miss = abs(sum(labels[i] == labels[j] for i, j in enumerate(permutation)) - wanted)
        if miss < best_miss:
            best, best_miss = permutation, miss
        if miss == 0:
            break
    return best


@dataclass(frozen=True)
class Row:
    """One line of the table: shares are of ``number`` questions, 0 to 1; columns in the order given."""

    kind: str
    number: int
    constant: float
    shares: dict[str, float]


def build_table(
    types: Sequence[str], answers: Sequence[str], columns: dict[str, Sequence[bool]]
) -> list[Row]:
    """Rows per question type and last the overall one.

    columns: for each column (such as ``before``, ``after``, ``swapped``, ``no image``) whether each
    question was right, in the order of ``types`` and ``answers``.  The best constant answer of the overall
    row knows the type: it is the sum over the types.
    """
    for name, right in columns.items():
        if len(right) != len(types):
            raise ValueError(f"column {name!r} has {len(right)} entries for {len(types)} questions")
    constants = best_constants(types, answers)
    rows = []
    for kind, (_, most) in constants.items():
        members = [index for index, other in enumerate(types) if other == kind]
        shares = {name: sum(right[i] for i in members) / len(members) for name, right in columns.items()}
        rows.append(Row(kind, len(members), most / len(members), shares))
    total = sum(most for _, most in constants.values()) / len(types)
    rows.append(Row(OVERALL, len(types), total, {n: sum(r) / len(types) for n, r in columns.items()}))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """The table as text, percentages with one decimal."""
    names = list(rows[0].shares)
    head = ["type", "questions", "best constant", *names]
    body = [
        [row.kind, str(row.number), f"{100 * row.constant:.1f} %"]
        + [f"{100 * row.shares[name]:.1f} %" for name in names]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        )
        for line in [head, *body]
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


@dataclass(frozen=True)
class Check:
    """One thing the quickstart promises, and whether it held."""

    passed: bool
    text: str


def check_table(rows: Sequence[Row], factor: float = 2.0, tolerance: float = 0.03) -> list[Check]:
    """The promises about a table with the columns before, after, swapped and no image.

    Colour and the overall score reach ``factor`` times the best constant answer; before training the model
    knew nothing (below half of it); with swapped pictures the score is that without pictures, up to
    ``tolerance``.
    """
    by_kind = {row.kind: row for row in rows}
    checks = []
    for kind in ("colour", OVERALL):
        row = by_kind[kind]
        after, wanted = row.shares["after"], factor * row.constant
        text = (
            f"{kind} {100 * after:.1f} % after training, {factor:g} x best constant is {100 * wanted:.1f} %"
        )
        checks.append(Check(after >= wanted, text))
    overall = by_kind[OVERALL]
    before = overall.shares["before"]
    checks.append(Check(before <= overall.constant / 2, f"overall {100 * before:.1f} % before training"))
    swapped, without = overall.shares["swapped"], overall.shares["no image"]
    text = f"overall {100 * swapped:.1f} % with swapped images, {100 * without:.1f} % without images"
    checks.append(Check(abs(swapped - without) <= tolerance, text))
    return checks
