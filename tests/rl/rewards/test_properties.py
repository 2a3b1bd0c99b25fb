"""Random answers: scores stay in their range, closer is never worse, and no malformed answer beats an honest one."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from megatron_vl.rl.rewards.compose import RewardWeights, compose
from megatron_vl.rl.rewards.geometry import Canvas, Decay, best_assignment, iou, point_closeness
from megatron_vl.rl.rewards.score import LENGTH, STOP, Services, score
from megatron_vl.rl.rewards.task import parse_task
from megatron_vl.rl.rewards.verdict import Malformed, Ok, VerifierError
from tests.rl.rewards.cases import BOX, CASES, POINT, TRIANGLE
from tests.rl.rewards.records import place, said

ODD = [
    "nan",
    "NaN",
    "inf",
    "-inf",
    "Infinity",
    "1e999",
    "-1e999",
    "1e-400",
    "-0",
    "401",
    "-1",
    "9" * 40,
    "",
    "x",
]


def random_number(draw: random.Random) -> str:
    return draw.choice(ODD) if draw.random() < 0.15 else f"{draw.uniform(-20, 420):.{draw.randint(0, 6)}f}"


def sound_box(numbers: list[str]) -> bool:
    """Written apart from the verifier: four finite numbers in order within 400 x 300."""
    try:
        x1, y1, x2, y2 = map(float, numbers)
    except ValueError:
        return False
    return 0 <= x1 < x2 <= 400 and 0 <= y1 < y2 <= 300 and max(map(len, numbers)) <= 32


@pytest.mark.parametrize(
    "record", [BOX, POINT, TRIANGLE, {**BOX, "floor": 0.3, "power": 3.0}], ids=lambda r: r["kind"]
)
def test_random_coordinates(record):
    task, draw, seen = parse_task(record), random.Random(7), set()
    for _ in range(1500):
        numbers = [random_number(draw) for _ in range(draw.choice([2, 4, 4, 4, 6]))]
        verdict = score(task, said(f"[{', '.join(numbers)}]"), STOP)
        assert not isinstance(verdict, VerifierError)
        if record["kind"] == "box":
            assert isinstance(verdict, Ok) == (len(numbers) == 4 and sound_box(numbers)), (numbers, verdict)
        if isinstance(verdict, Ok):
            assert 0.0 <= verdict.score <= 1.0
        seen.add(type(verdict) if isinstance(verdict, Ok) else verdict.reason)
    assert {Ok, "not_finite", "out_of_image"} <= seen


def test_the_score_falls_strictly_with_the_distance():
    for power, floor in ((1.0, 0.0), (2.0, 0.0), (0.5, 0.25)):
        decay = Decay(floor, power)
        points = [decay(point_closeness((0.0, 0.0), (distance, 0.0), 50.0)) for distance in range(60)]
        boxes = [decay(iou((0, 0, 100, 100), (shift, 0, 100 + shift, 100))) for shift in range(120)]
        for scores in (points, boxes):
            assert scores[0] == 1.0 and scores[-1] == 0.0
            assert all(a > b or a == b == 0.0 for a, b in itertools.pairwise(scores))


def test_the_unit_of_coordinates_changes_nothing():
    draw = random.Random(3)
    canvases = {name: Canvas(400, 300, name) for name in ("pixel", "0-1", "0-1000")}
    spans = {"pixel": (400, 300), "0-1": (1, 1), "0-1000": (1000, 1000)}
    for _ in range(200):
        shares = [sorted(draw.random() for _ in range(2)) for _ in range(2)]
        boxes = []
        for name, canvas in canvases.items():
            (x1, x2), (y1, y2) = shares
            wide, high = spans[name]
            boxes.append(canvas.box((x1 * wide, y1 * high, x2 * wide, y2 * high)))
        assert all(box == pytest.approx(boxes[0]) for box in boxes)


def random_box(draw: random.Random) -> tuple[float, float, float, float]:
    x, y = draw.randint(0, 8), draw.randint(0, 8)
    return float(x), float(y), float(x + draw.randint(1, 6)), float(y + draw.randint(1, 6))


def test_iou_against_counting_pixels():
    draw = random.Random(5)
    for _ in range(300):
        one, two = random_box(draw), random_box(draw)
        cells = [
            {(x, y) for x in range(int(b[0]), int(b[2])) for y in range(int(b[1]), int(b[3]))}
            for b in (one, two)
        ]
        assert iou(one, two) == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]))


def test_best_assignment_against_every_assignment():
    draw = random.Random(11)
    for _ in range(300):
        rows, columns = draw.randint(1, 5), draw.randint(1, 5)
        scores = [[draw.choice([0.0, 0.5, draw.random()]) for _ in range(columns)] for _ in range(rows)]
        wide = scores if rows <= columns else [list(column) for column in zip(*scores)]
        best = max(
            sum(row[column] for row, column in zip(wide, order))
            for order in itertools.permutations(range(len(wide[0])), len(wide))
        )
        assert best_assignment(scores) == pytest.approx(best)


@pytest.mark.parametrize("weights", [RewardWeights(), RewardWeights(score=2.0, language=0.7)])
def test_malformed_never_beats_an_honest_wrong_answer(weights):
    """Also when the honest answer pays every penalty."""
    other_language = " ".join(["слово"] * 50)
    question = " ".join(["word"] * 50)
    tasks = {case[1]["kind"]: parse_task(case[1]) for case in CASES}
    for task in tasks.values():
        honest = compose(task, Ok(0.0), question, other_language, weights)
        for verdict in (Malformed("several_answers"), score(task, "x", LENGTH, Services(math=object()))):
            worst = compose(task, verdict, question, "", weights)
            assert worst.total <= honest.total and worst.total == weights.lowest
            assert sum(worst.penalties.values()) == pytest.approx(worst.total)
        right = compose(task, Ok(1.0), question, other_language, weights)
        assert right.total > compose(task, Ok(0.0), question, question, weights).total


def test_penalties_are_signed_and_logged_singly():
    task, weights = parse_task({"kind": "count", "answer": 3}), RewardWeights(language=0.5)
    question, answer = "How many dogs are there in this picture of a park? " * 2, "三只狗" * 30
    reward = compose(task, Ok(1.0), question, answer, weights)
    assert reward.penalties == {"language": pytest.approx(-0.5)} and reward.total == pytest.approx(0.5)
    assert (reward.score, reward.masked, reward.outcome, reward.verifier) == (1.0, False, "ok", "count")
    masked = compose(task, VerifierError("judge_timeout"), question, answer, weights)
    assert masked.masked and masked.penalties == {} and masked.reason == "judge_timeout"
    assert reward.task == task.digest != parse_task({"kind": "count", "answer": 4}).digest


def test_a_box_of_nothing_but_nan_is_the_worst_answer():
    """What one public reward calls correct (40.0 for four NaN, 1.0 for swapped corners) is below a far box here."""
    task = parse_task(place("box", [[100, 100, 200, 200]]))
    far = compose(task, score(task, said("[300, 200, 390, 290]"), STOP), "", "", RewardWeights(language=0.1))
    for text in ("[nan, nan, nan, nan]", "[200, 200, 100, 100]", "[1, 2, 3]", ""):
        bad = compose(task, score(task, said(text), STOP), "", "", RewardWeights(language=0.1))
        assert bad.total < far.total and math.isfinite(bad.total)
