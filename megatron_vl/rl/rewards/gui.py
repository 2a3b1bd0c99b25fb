"""Verifier of actions on a graphical interface: one JSON object, checked against a schema before it is compared."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping

from megatron_vl.rl.rewards.geometry import Canvas, Decay, point_closeness
from megatron_vl.rl.rewards.numeric import MAX_DIGITS
from megatron_vl.rl.rewards.verdict import NotAnAnswer, Ok, shown

# What a parameter may be; a list of strings instead names the allowed ones.
TYPES = ("point", "string", "integer", "number")
MAX_DEPTH = 8

# Ours; a task may bring its own: action -> parameter -> type.
ACTIONS: Mapping[str, Mapping[str, object]] = {
    "click": {"point": "point"},
    "double_click": {"point": "point"},
    "right_click": {"point": "point"},
    "drag": {"start": "point", "end": "point"},
    "type": {"text": "string"},
    "press": {"key": "string"},
    "scroll": {"direction": ("up", "down", "left", "right")},
    "wait": {},
    "done": {},
}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_FENCE = re.compile(r"```(?:json)?\s(?P<body>.*)```", re.DOTALL)


def read_action(text: str, actions: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """The action of an answer: a JSON object alone or in one code fence, with "action" and exactly its parameters.

    Raises NotAnAnswer (`broken_json`, `json_too_deep`, `number_too_long`, `not_finite`, `duplicate_key`,
    `not_an_object`, `unknown_action`, `wrong_parameters`).
    """
    fenced = _FENCE.fullmatch(text.strip())
    body = fenced["body"] if fenced else text
    if depth(body) > MAX_DEPTH:
        raise NotAnAnswer("json_too_deep", f"nested more than {MAX_DEPTH} deep")
    try:
        action = json.loads(
            body, object_pairs_hook=_pairs, parse_int=_integer, parse_float=_decimal, parse_constant=_constant
        )
    except NotAnAnswer:
        raise
    except (ValueError, RecursionError) as error:
        raise NotAnAnswer("broken_json", shown(str(error))) from error
    check_action(action, actions)
    return action


def check_action(action: object, actions: Mapping[str, Mapping[str, object]]) -> None:
    """Raises NotAnAnswer where an action does not follow the schema: see `read_action`."""
    if not isinstance(action, dict):
        raise NotAnAnswer("not_an_object", f"a {type(action).__name__} is not an action")
    name = action.get("action")
    if not isinstance(name, str) or name not in actions:
        raise NotAnAnswer("unknown_action", f"{shown(str(name))} is not one of {', '.join(actions)}")
    schema = actions[name]
    if set(action) - {"action"} != set(schema):
        raise NotAnAnswer("wrong_parameters", f"{name} takes {', '.join(schema) or 'nothing'}")
    for key, kind in schema.items():
        if not _fits(action[key], kind):
            raise NotAnAnswer("wrong_parameters", f"{key} of {name} is not {shown(str(kind))}")


def score_action(
    gold: Mapping[str, object],
    actions: Mapping[str, Mapping[str, object]],
    canvas: Canvas,
    decay: Decay,
    radius: float,
    text: str,
) -> Ok:
    """0 for another action than `gold`, else the mean over its parameters, 1 without any.

    A point scores as in `score_points`, or 1 inside and 0 outside where `gold` has a box of four numbers; strings,
    which are typed, are compared to the letter but for white space around them; all else by equality. Raises
    NotAnAnswer: see `read_action`, and `out_of_image`.
    """
    given = read_action(text, actions)
    points = [key for key, kind in actions[str(given["action"])].items() if kind == "point"]
    places = {key: canvas.point(*given[key]) for key in points}  # checked for a wrong action, too
    if given["action"] != gold["action"]:
        return Ok(0.0, {"action": 0.0})
    scores = {}
    for key, wanted in gold.items():
        if key in places and len(wanted) == 4:
            left, top, right, bottom = canvas.box(wanted)
            scores[key] = float(left <= places[key][0] <= right and top <= places[key][1] <= bottom)
        elif key in places:
            reach = radius * canvas.diagonal
            scores[key] = decay(point_closeness(places[key], canvas.point(*wanted), reach))
        elif isinstance(wanted, str):
            scores[key] = float(str(given[key]).strip() == wanted.strip())
        else:
            scores[key] = float(given[key] == wanted)
    action = scores.pop("action")
    return Ok(sum(scores.values()) / len(scores) if scores else 1.0, {"action": action, **scores})


def depth(text: str) -> int:
    """How deep the brackets of a JSON text nest at most, those in strings left out."""
    deepest = level = 0
    for char in _STRING.sub("", text):
        if char in "[{":
            level += 1
            deepest = max(deepest, level)
        elif char in "]}":
            level -= 1
    return deepest


def _fits(value: object, kind: object) -> bool:
    if kind == "point":
        return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))
    if kind == "string":
        return isinstance(value, str)
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "number":
        return is_number(value)
    return isinstance(value, str) and value in kind  # type: ignore[operator]


def is_number(value: object) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and abs(value) <= sys.float_info.max  # no NaN, no integer that no float holds


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotAnAnswer("duplicate_key", f"among {shown(', '.join(key for key, _ in pairs))}")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise NotAnAnswer("number_too_long", f"{len(text)} characters, at most {MAX_DIGITS}")
    return int(text)


def _decimal(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise NotAnAnswer("number_too_long", f"{len(text)} characters, at most {MAX_DIGITS}")
    value = float(text)
    if not math.isfinite(value):
        raise NotAnAnswer("not_finite", shown(text))
    return value


def _constant(text: str) -> float:
    raise NotAnAnswer("not_finite", text)
