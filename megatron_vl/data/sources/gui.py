"""GUI trajectories: conversations whose assistant turns act, checked against a file that lists the actions.

    {"id": "t1", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "s0.png"}, {"type": "text", "text": "Log in"}]},
        {"role": "assistant", "content": "The button is at the top.", "action": {"name": "CLICK", "point": [500, 82]}},
        ...]}

An assistant turn carries `action` (an object) or `actions` (a list). They are appended to its text, one line of
JSON each: `{"action": "CLICK", "point": [500, 82]}`. A turn without these keys may end in such a line itself,
which is then checked and kept as written. ShareGPT turns (`from`, `value`) are accepted likewise.

The schema file, for example `gui_actions.json` beside this module (its twelve actions are this library's: the
published list names only four):

    {"coordinate_convention": "0-1000", "action_required": true, "actions": {
        "CLICK": {"point": {"type": "point"}},
        "SCROLL": {"direction": {"type": "string", "choices": ["up", "down"]}, "steps": {"type": "integer",
                   "min": 1, "max": 20, "optional": true}}}}

Types: string (`choices`, `min_length`, `max_length`), integer and number (`min`, `max`), boolean, point [x, y],
box [x1, y1, x2, y2]. Coordinates lie in 0..1 or 0..1000; in `pixel` they are only known not to be negative,
since the images are not open yet.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.record import Record
from megatron_vl.data.sources.sharegpt import openai_record, parse_converted
from megatron_vl.errors import DataError

DEFAULT_SCHEMA = Path(__file__).with_name("gui_actions.json")
CONVENTIONS = {"pixel": math.inf, "0-1": 1.0, "0-1000": 1000.0}
_COORDINATES = {"point": 2, "box": 4}
_LIMITS = {
    "string": {"choices", "min_length", "max_length"},
    "integer": {"min", "max"},
    "number": {"min", "max"},
    "boolean": set(),
    "point": set(),
    "box": set(),
}


@dataclass(frozen=True)
class Parameter:
    """What the value of one parameter may be. low, high: of a number, or of the length of a string."""

    type: str
    optional: bool = False
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf

    def problem(self, value: object) -> str | None:
        """Why `value` is not accepted, None when it is."""
        if self.type == "boolean":
            return None if isinstance(value, bool) else "must be true or false"
        if self.type == "string":
            if not isinstance(value, str):
                return "must be a string"
            if self.choices and value not in self.choices:
                return f"must be one of {', '.join(self.choices)}"
            fits = self.low <= len(value) <= self.high
            return None if fits else f"has {len(value)} characters, not {self.low:g} to {self.high:g}"
        if self.type in _COORDINATES:
            count = _COORDINATES[self.type]
            if not isinstance(value, list) or len(value) != count:
                return f"must be a list of {count} numbers"
            outside = [one for one in value if not self._in_range(one)]
            if outside:
                return f"holds {outside[0]!r:.40}, not a number from {self.low:g} to {self.high:g}"
            ordered = count == 2 or (value[0] <= value[2] and value[1] <= value[3])
            return None if ordered else "must be [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2"
        if self.type == "integer" and not isinstance(value, int):
            return "must be an integer"
        return None if self._in_range(value) else f"must be a number from {self.low:g} to {self.high:g}"

    def _in_range(self, value: object) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and self.low <= value <= self.high


@dataclass(frozen=True)
class ActionSchema:
    """The actions of a data set: name -> parameter -> rule. action_required: in every assistant turn."""

    actions: dict[str, dict[str, Parameter]]
    coordinate_convention: str
    action_required: bool = True

    def check(self, action: object, where: str) -> dict:
        """`action` as it is trained on: {"action": name, parameters in the order of the schema}.

        action: an object with `name` or `action`, and the parameters. Raises SampleRefused bad_action,
        unknown_action, unknown_parameter, missing_parameter, bad_parameter.
        """
        keys = [key for key in ("name", "action") if isinstance(action, dict) and key in action]
        # an action may have a parameter called name; then `action` holds its own
        key = "action" if "action" in keys else "name"
        if not keys or not isinstance(action[key], str):
            raise SampleRefused(
                "bad_action", f"{where} is {_shown(action)}; it must be an object with a name"
            )
        name = action[key]
        rules = self.actions.get(name)
        if rules is None:
            raise SampleRefused(
                "unknown_action", f"{where} is {_shown(name)}; the schema lists {', '.join(self.actions)}"
            )
        given = {parameter: value for parameter, value in action.items() if parameter != key}
        for parameter in given:
            if parameter not in rules:
                raise SampleRefused(
                    "unknown_parameter",
                    f"{where}: {name} has no parameter {_shown(parameter)}; it has {', '.join(rules) or 'none'}",
                )
        checked = {"action": name}
        for parameter, rule in rules.items():
            if parameter not in given:
                if rule.optional:
                    continue
                raise SampleRefused("missing_parameter", f"{where}: {name} needs {parameter}")
            problem = rule.problem(given[parameter])
            if problem:
                raise SampleRefused(
                    "bad_parameter", f"{where}: {name}.{parameter} is {_shown(given[parameter])}: {problem}"
                )
            checked[parameter] = given[parameter]
        return checked


@dataclass(frozen=True)
class GuiLine(Record):
    """One trajectory and the schema that its actions must follow."""

    schema: ActionSchema

    def parse(self) -> Sample:
        return parse_converted(
            self.data, self.default_id, lambda record: trajectory_record(record, self.schema)
        )


def trajectory_record(record: dict, schema: ActionSchema) -> dict:
    """The record with every action checked and written into the text of its turn."""
    if "conversations" in record and "messages" not in record:
        turns = record["conversations"]
        converted = openai_record(record)
        shift = len(converted["messages"]) - len(turns)  # a system text before them
        for message, turn in zip(converted["messages"][shift:], turns):
            message.update({key: turn[key] for key in ("action", "actions") if key in turn})
        record = converted
    messages = record.get("messages")
    if not isinstance(messages, list):
        return record  # parse_sample says what is missing
    messages = [_with_action(message, f"messages[{n}]", schema) for n, message in enumerate(messages)]
    return {**record, "messages": messages}


def load_schema(path: str | Path) -> ActionSchema:
    """Reads a schema file. Raises DataError that names the entry, the rule and the remedy."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable action schema ({error}); see docs/data.md") from error
    known = {"note", "coordinate_convention", "action_required", "actions"}
    actions = content.get("actions") if isinstance(content, dict) else None
    if not isinstance(actions, dict) or not actions or not set(content) <= known:
        raise DataError(
            f"{path}: an action schema is an object with actions and may have {', '.join(sorted(known))}"
        )
    convention = content.get("coordinate_convention")
    if convention not in CONVENTIONS:
        raise DataError(
            f"{path}: coordinate_convention = {_shown(convention)}: must be one of {', '.join(CONVENTIONS)}"
        )
    required = content.get("action_required", True)
    if not isinstance(required, bool):
        raise DataError(f"{path}: action_required = {_shown(required)}: must be true or false")
    schema = {}
    for name, parameters in actions.items():
        if not isinstance(parameters, dict) or "action" in parameters:
            raise DataError(
                f"{path}: actions.{name} must be an object of parameters, none of which is called action"
            )
        schema[name] = {
            key: _parameter(rule, f"{path}: actions.{name}.{key}", CONVENTIONS[convention])
            for key, rule in parameters.items()
        }
    return ActionSchema(schema, convention, required)


def _parameter(rule: object, where: str, largest_coordinate: float) -> Parameter:
    kind = rule.get("type") if isinstance(rule, dict) else None
    if kind not in _LIMITS:
        raise DataError(f"{where} is {_shown(rule)}: type must be one of {', '.join(_LIMITS)}")
    unknown = set(rule) - _LIMITS[kind] - {"type", "optional"}
    if unknown:
        raise DataError(f"{where}: {', '.join(sorted(unknown))} is no limit of a {kind}; remove it")
    choices = rule.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}.choices is {_shown(choices)}: must be a list of strings")
    if not isinstance(rule.get("optional", False), bool):
        raise DataError(f"{where}.optional is {_shown(rule['optional'])}: must be true or false")
    limits = [(name, rule[name]) for name in ("min", "max", "min_length", "max_length") if name in rule]
    for name, value in limits:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DataError(f"{where}.{name} is {_shown(value)}: must be a number")
    low, high = (
        rule.get("min", rule.get("min_length", -math.inf)),
        rule.get("max", rule.get("max_length", math.inf)),
    )
    if kind in _COORDINATES:
        low, high = 0.0, largest_coordinate
    if low > high:
        raise DataError(f"{where}: from {low:g} to {high:g} leaves nothing; correct the limits")
    return Parameter(kind, rule.get("optional", False), tuple(choices), low, high)


def _with_action(message: object, where: str, schema: ActionSchema) -> object:
    """The turn with its actions in its text. Turns of others must not act."""
    if not isinstance(message, dict):
        return message
    given = [key for key in ("action", "actions") if message.get(key) is not None]
    if message.get("role") != "assistant":
        if given:
            raise SampleRefused("bad_action", f"{where} has an action, but is not an assistant turn")
        return message
    if len(given) == 2:
        raise SampleRefused("two_forms", f"{where} has action beside actions")
    if not given:
        _check_written(message.get("content"), where, schema)
        return message
    actions = message[given[0]] if given[0] == "actions" else [message["action"]]
    if not isinstance(actions, list) or not actions:
        raise SampleRefused(
            "bad_action", f"{where}.actions is {_shown(actions)}; it must be a list of actions"
        )
    lines = [
        json.dumps(schema.check(action, f"{where}.{given[0]}"), ensure_ascii=False, allow_nan=False)
        for action in actions
    ]
    content = message.get("content") or ""
    if not isinstance(content, str):
        raise SampleRefused("bad_message", f"{where}.content of a turn with an action must be a string")
    return {"role": "assistant", "content": "\n".join([content, *lines] if content else lines)}


def _check_written(content: object, where: str, schema: ActionSchema) -> None:
    """Checks the action in the last line of a turn's text, which is where one may stand."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    last = content.rstrip().rpartition("\n")[2].strip() if isinstance(content, str) else ""
    if not last.startswith("{"):
        if schema.action_required:
            raise SampleRefused(
                "missing_action", f"{where} has no action, and its text does not end in a line with one"
            )
        return
    try:
        action = json.loads(last)
    except (ValueError, RecursionError) as error:
        raise SampleRefused(
            "bad_action", f"{where}: the last line {_shown(last)} is no JSON: {error}"
        ) from error
    if "action" not in action:
        raise SampleRefused("bad_action", f'{where}: the last line {_shown(last)} has no key "action"')
    schema.check(action, where)


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError, TypeError):
        text = repr(type(value))
    return text if len(text) <= 80 else text[:77] + "..."
