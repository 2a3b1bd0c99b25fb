"""What the quickstart asks, and how many of each: plans of pictures and their questions, without drawing any.

Two properties make the score table readable, and both are decided here rather than hoped for:

* Held-out answers are balanced: within a type every answer occurs equally often (every box once), so a
  constant answer scores exactly one part in the number of answers.
* Every type has one wording.  With swapped pictures the model therefore sees inputs just like the others,
  and only the answer expected of it changes (see ``scoring.swap_partners``).
"""

import random
from collections import Counter
from dataclasses import dataclass

from scenes import (
    COLOURS,
    COUNTS,
    POSITIONS,
    SHAPES,
    WORDS,
    Scene,
    count_scene,
    pick_size,
    single_scene,
    word_scene,
)

QUESTIONS = {
    "colour": "What colour is it?",
    "position": "Where is it?",
    "shape": "What shape is it?",
    "count": "How many are there?",
    "word": "What does it say?",
    "box": "Give its box.",
}
SHARES = {"colour": 0.30, "position": 0.20, "shape": 0.15, "count": 0.15, "word": 0.10, "box": 0.10}
ANSWERS = {
    "colour": tuple(COLOURS),
    "position": POSITIONS,
    "shape": SHAPES,
    "count": COUNTS,
    "word": WORDS,
}
QUESTIONS_PER_IMAGE = 2.2
# Long, thin pictures hold words and rows of objects; a single object would be tiny in them.
CROPS_SINGLE = {0: 0.5, 2: 0.12, 4: 0.28, 6: 0.1}
CROPS_OTHER = {0: 0.36, 2: 0.2, 3: 0.14, 4: 0.1, 5: 0.1, 6: 0.1}


@dataclass(frozen=True)
class Picture:
    """A scene and what is asked about it: pairs ``(type, answer)``, each type at most once."""

    scene: Scene
    asked: tuple[tuple[str, str], ...]


def question_counts(total: int, exact: bool) -> dict[str, int]:
    """Questions of each type, about ``total`` in all; ``exact`` makes them multiples of the answers."""
    counts = {}
    for kind, share in SHARES.items():
        step = len(ANSWERS[kind]) if exact and kind in ANSWERS else 1
        counts[kind] = max(1, round(total * share / step)) * step
    return counts


def balanced(answers: tuple[str, ...], number: int, rng: random.Random) -> list[str]:
    """``number`` answers in random order, each as often as the others up to one."""
    pool = [answers[index % len(answers)] for index in range(number)]
    rng.shuffle(pool)
    return pool


def deal_questions(counts: dict[str, int]) -> list[tuple[str, list[str]]]:
    """Share the questions out over pictures: ``(kind of scene, types asked)`` for each picture.

    A ``count`` or ``word`` scene asks its own question and in six of ten cases the colour; the rest goes
    to ``single`` scenes, about three to a picture and never two of one type.
    """
    others = [("count", ["count"]) for _ in range(counts["count"])]
    others += [("word", ["word"]) for _ in range(counts["word"])]
    colours = min(round(0.6 * len(others)), counts["colour"])
    # Spread evenly over the list, so that both kinds of scene get their share.
    for number in range(colours):
        others[number * len(others) // colours][1].append("colour")
    remaining = {"colour": counts["colour"] - colours}
    remaining |= {kind: counts[kind] for kind in ("position", "shape", "box")}
    singles = max(max(remaining.values()), round(sum(remaining.values()) / 3))
    dealt: list[tuple[str, list[str]]] = [("single", []) for _ in range(singles)]
    slots = [kind for kind, number in remaining.items() for _ in range(number)]
    for slot, kind in enumerate(slots):
        dealt[slot % singles][1].append(kind)
    return others + dealt


def make_pictures(total_questions: int, exact: bool, seed: str) -> list[Picture]:
    """Plan the pictures of one split; the same arguments always give the same plan.

    ``exact`` is for held-out pictures: perfectly balanced answers, and no box twice.
    """
    rng = random.Random(seed)
    counts = question_counts(total_questions, exact)
    pools = {kind: balanced(ANSWERS[kind], counts[kind], rng) for kind in ANSWERS}
    boxes: set[str] | None = set() if exact else None
    dealt = deal_questions(counts)
    rng.shuffle(dealt)
    return [_make_picture(rng, kind, types, pools, boxes) for kind, types in dealt]


def _make_picture(
    rng: random.Random, kind: str, types: list[str], pools: dict[str, list[str]], boxes: set[str] | None
) -> Picture:
    """One picture: answers asked for come from the balanced pools, everything else by lot."""
    facts = {key: pools[key].pop() if key in types else rng.choice(ANSWERS[key]) for key in ANSWERS}
    size = _pick_size(rng, CROPS_SINGLE if kind == "single" else CROPS_OTHER)
    if kind == "count":
        scene = count_scene(rng, size, facts["colour"], facts["shape"], int(facts["count"]))
    elif kind == "word":
        scene = word_scene(rng, size, facts["colour"], facts["word"])
    else:
        scene = single_scene(rng, size, facts["colour"], facts["shape"], facts["position"])
        while "box" in types and boxes is not None and scene.box() in boxes:
            size = _pick_size(rng, CROPS_SINGLE)
            scene = single_scene(rng, size, facts["colour"], facts["shape"], facts["position"])
        facts["box"] = scene.box()
        if boxes is not None and "box" in types:
            boxes.add(facts["box"])
    order = rng.sample(types, len(types))
    return Picture(scene, tuple((asked, facts[asked]) for asked in order))


def _pick_size(rng: random.Random, weights: dict[int, float]) -> tuple[int, int]:
    """A picture size, its number of crops drawn by ``weights``."""
    return pick_size(rng, rng.choices(list(weights), weights=list(weights.values()))[0])


def make_text_only(number: int, seed: str) -> list[tuple[str, str]]:
    """``number`` pairs ``(type, answer)`` for questions without a picture.

    Their answers are as often as those of questions with one: a model that is asked without a picture
    thereby learns the prior, which is what its score without pictures is meant to show.
    """
    rng = random.Random(seed)
    counts = question_counts(number, exact=False)
    pairs = [(kind, answer) for kind in ANSWERS for answer in balanced(ANSWERS[kind], counts[kind], rng)]
    for picture in make_pictures(round(counts["box"] / SHARES["box"]), exact=False, seed=f"{seed} boxes"):
        pairs += [pair for pair in picture.asked if pair[0] == "box"]
    rng.shuffle(pairs)
    return pairs


def count_answers(pairs: list[tuple[str, str]]) -> dict[str, Counter]:
    """How often each answer of each type occurs."""
    tallies: dict[str, Counter] = {kind: Counter() for kind in QUESTIONS}
    for kind, answer in pairs:
        tallies[kind][answer] += 1
    return tallies
