"""Records of prompts: what is read, and what each mistake says."""

from __future__ import annotations

import json

import pytest

from megatron_vl.errors import DataError
from megatron_vl.rl.rewards.task import KEYS, parse_task
from tests.rl.rewards.cases import BOX, CASES, CLICK, POINT, TRIANGLE

MISTAKES = [
    ("no object", ["math"], "it must be an object with kind and answer"),
    (
        "unknown kind",
        {"kind": "maths", "answer": "5"},
        'task.kind = "maths": it must be one of exact, choice',
    ),
    ("list for kind", {"kind": ["math"], "answer": "5"}, 'task.kind = ["math"]: it must be one of exact'),
    ("no kind", {"answer": "5"}, "task.kind is missing"),
    (
        "unknown key",
        {"kind": "math", "answer": "5", "tolerance": 1},
        "task.tolerance = 1: it is not read for kind math",
    ),
    ("key of another kind", {"kind": "count", "answer": 5, "units": ["m"]}, "is not read for kind count"),
    ("no answer", {"kind": "math"}, "task.answer is missing"),
    ("empty answer", {"kind": "math", "answer": " "}, "must be text, not empty"),
    ("long answer", {"kind": "exact", "answer": "x" * 513}, "at most 512 characters"),
    ("number for text", {"kind": "math", "answer": 5}, "must be text"),
    ("flag", {"kind": "math", "answer": "5", "thinking": "yes"}, "must be true or false"),
    (
        "letter not offered",
        {"kind": "choice", "answer": "C", "choices": ["a", "b"]},
        "must be letters of A, B",
    ),
    ("letter twice", {"kind": "choice", "answer": ["A", "A"], "choices": ["a", "b"]}, "each once"),
    ("no options", {"kind": "choice", "answer": "A"}, "task.choices is missing: it must be 2 to 26 texts"),
    ("number", {"kind": "numeric", "answer": float("nan")}, "must be a finite number"),
    ("integer of 400 digits", {"kind": "numeric", "answer": 10**400}, "it must be a finite number"),
    (
        "tolerance of 400 digits",
        {"kind": "numeric", "answer": 5, "abs_tolerance": 10**400},
        "finite number from 0",
    ),
    ("box of 400 digits", {**BOX, "answer": [1, 2, 3, 10**400]}, "must be lists of 4 finite numbers"),
    ("image of 400 digits", {**BOX, "image_size": [10**400, 10**400]}, "at most 1000000 each"),
    (
        "action of 400 digits",
        {**CLICK, "answer": {"action": "click", "point": [10**400, 1]}},
        "cannot be right: wrong_parameters",
    ),
    ("text for number", {"kind": "numeric", "answer": "5"}, "must be a finite number"),
    ("negative tolerance", {"kind": "numeric", "answer": 5, "abs_tolerance": -1}, "finite number from 0"),
    ("half a thing", {"kind": "count", "answer": 2.5}, "must be a whole number from 0"),
    ("true things", {"kind": "count", "answer": True}, "must be a whole number from 0"),
    (
        "no image size",
        {"kind": "box", "answer": [1, 2, 3, 4], "coordinates": "pixel"},
        "task.image_size is missing",
    ),
    (
        "no convention",
        {"kind": "box", "answer": [1, 2, 3, 4], "image_size": [9, 9]},
        "task.coordinates is missing",
    ),
    ("convention", {**BOX, "coordinates": "percent"}, "must be one of pixel, 0-1, 0-1000"),
    ("image size", {**BOX, "image_size": [400.5, 300]}, "must be [width, height] in pixels"),
    ("swapped gold", {**BOX, "answer": [[200, 100, 100, 200]]}, "cannot be right: swapped_corners"),
    ("gold outside", {**BOX, "answer": [[0, 0, 500, 100]]}, "cannot be right: out_of_image"),
    ("gold NaN", {**BOX, "answer": [[0, 0, float("nan"), 100]]}, "must be lists of 4 finite numbers"),
    ("point of three", {**POINT, "answer": [1, 2, 3]}, "must be lists of 2 finite numbers"),
    ("floor", {**BOX, "floor": 1.0}, "from 0 and below 1"),
    ("power", {**BOX, "power": 0}, "must be a finite number above 0"),
    ("radius", {**POINT, "radius": 0}, "must be a finite number above 0"),
    ("gold bow tie", {**TRIANGLE, "answer": [[0, 0], [100, 100], [100, 0], [0, 100]]}, "bad_polygon"),
    ("gold line", {**TRIANGLE, "answer": [[0, 0], [100, 100]]}, "at least 3 corners"),
    ("gold action", {**CLICK, "answer": {"action": "fly"}}, "cannot be right: unknown_action"),
    ("gold parameters", {**CLICK, "answer": {"action": "click"}}, "cannot be right: wrong_parameters"),
    ("gold point outside", {**CLICK, "answer": {"action": "click", "point": [900, 0]}}, "out_of_image"),
    ("schema", {**CLICK, "actions": {"click": {"point": "place"}}}, "must map actions to parameters"),
    ("schema, no object", {**CLICK, "actions": ["click"]}, "must map actions to parameters"),
    (
        "process without question",
        {"kind": "math", "answer": "5", "check_process": True},
        "task.question is missing",
    ),
]


@pytest.mark.parametrize(
    ("record", "message"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_mistakes(record, message):
    with pytest.raises(DataError) as error:
        parse_task(record)
    assert message in str(error.value)


def test_no_record_raises_anything_else():
    """Every key of every kind with values of every form: a task or a DataError, for one line must not end a run."""
    odd = [
        None,
        True,
        -1,
        10**400,
        float("nan"),
        "",
        "x",
        "\ud800",
        [],
        [[]],
        [1, "x"],
        [[1, 2], "x"],
        {},
        {"x": []},
    ]
    odd += [
        {"action": ["click"]},
        {"action": "click", "point": {}},
        {"click": {"point": []}},
        [{}],
        [1, 2, 3, 4],
    ]
    examples = {case[1]["kind"]: case[1] for case in CASES} | {"judge": {"kind": "judge", "answer": "x"}}
    for kind, record in examples.items():
        for key in ("kind", "thinking", "check_process", "question", *KEYS[kind]):
            for value in odd:
                try:
                    assert len(parse_task({**record, key: value}).digest) == 16
                except DataError as error:
                    assert "task" in str(error)


def test_the_place_of_a_record_is_told():
    with pytest.raises(DataError, match="^prompts.jsonl:7 task.kind is missing"):
        parse_task({}, "prompts.jsonl:7 task")


def test_every_kind_of_the_table_survives_json():
    for _, record, _, _ in CASES:
        assert parse_task(json.loads(json.dumps(record))) == parse_task(record)
    assert {case[1]["kind"] for case in CASES} | {"judge"} == set(KEYS)


def test_own_actions():
    record = {**CLICK, "actions": {"tap": {"at": "point", "times": "integer"}}}
    record["answer"] = {"action": "tap", "at": [5, 5], "times": 2}
    assert parse_task(record).action_schema == {"tap": {"at": "point", "times": "integer"}}
