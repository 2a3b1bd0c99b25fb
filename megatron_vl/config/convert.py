"""From a plain tree (what YAML gives) to typed dataclasses, strictly: every deviation becomes a `Problem`.

The converters never raise; they add to a list of problems and go on, so that all errors are reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

import yaml

from megatron_vl.config.key import Limits
from megatron_vl.errors import Problem

FAILED = object()
MAX_EXPONENT = 30


@dataclasses.dataclass(frozen=True)
class Typed:
    """A value typed on the command line: its text, which is YAML unless the key wants a string."""

    text: str

    def __repr__(self) -> str:
        return self.text


def to_dataclass(cls: type, tree: Mapping[str, Any], path: str, problems: list[Problem]) -> Any:
    """An instance of `cls` from `tree`; missing and refused keys take their defaults.

    So the caller can go on and check the rest. FAILED when a key without a default is missing or refused.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems += [unknown_key(name, path, fields) for name in tree if name not in fields]
    values = {}
    for name, field in fields.items():
        here = join(path, name)
        if name in tree:
            value = to_type(hints[name], tree[name], here, field.metadata["limits"], problems)
            if value is not FAILED:
                values[name] = value
        elif _is_required(field):
            problems.append(
                Problem(here, None, "is required", f"add it: {field.metadata['doc']}", show_value=False)
            )
    complete = all(name in values or not _is_required(field) for name, field in fields.items())
    return cls(**values) if complete else FAILED


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def to_type(hint: Any, value: Any, path: str, limits: Limits, problems: list[Problem]) -> Any:
    """`value` as the type `hint`, within `limits`; FAILED after a problem."""
    if isinstance(value, Typed):
        value = _typed(hint, value.text, path, problems)
    if value is FAILED:
        return FAILED
    optional = type(None) in typing.get_args(hint)
    if optional:
        if value is None or isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if dataclasses.is_dataclass(hint):
        if value is None:
            return to_dataclass(hint, {}, path, problems)
        if not isinstance(value, Mapping):
            return _refuse(
                problems, path, value, "must be a section of keys", "write its keys indented below it"
            )
        return to_dataclass(hint, value, path, problems)
    if typing.get_origin(hint) is list:
        return _to_list(typing.get_args(hint)[0], value, path, limits, problems)
    result = _to_scalar(hint, value)
    if result is FAILED:
        article = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint]
        rule = f"must be {article}{' or none' if optional else ''}"
        return _refuse(problems, path, value, rule, _type_remedy(hint, value))
    rule = limits.broken_rule(result)
    if rule:
        near = difflib.get_close_matches(str(result), map(str, limits.choices), n=1)
        remedy = (
            f"did you mean {near[0]}?"
            if near
            else "choose one of them"
            if limits.choices
            else "change the value"
        )
        return _refuse(problems, path, value, rule, remedy)
    return result


def unknown_key(name: str, path: str, known: Iterable[str]) -> Problem:
    """The problem of a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    remedy = f"did you mean {join(path, near[0])}?" if near else f"the keys here are {', '.join(known)}"
    return Problem(join(path, str(name)), None, "unknown key", remedy, show_value=False)


def join(path: str, name: str) -> str:
    """`path.name`, or `name` at the root."""
    return f"{path}.{name}" if path else name


def _to_list(element: Any, value: Any, path: str, limits: Limits, problems: list[Problem]) -> Any:
    if not isinstance(value, list):
        return _refuse(
            problems, path, value, "must be a list", "write it as [a, b] or as lines that begin with '- '"
        )
    before = len(problems)
    items = [to_type(element, item, f"{path}[{index}]", limits, problems) for index, item in enumerate(value)]
    return items if len(problems) == before else FAILED


def _to_scalar(hint: type, value: Any) -> Any:
    if hint is bool or hint is str:
        return value if type(value) is hint else FAILED
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return FAILED
    return _to_int(value) if hint is int else _to_float(value)


def _to_float(value: int | float | str) -> Any:
    """PyYAML reads 5e-5 as a string (YAML 1.1 asks for a dot), so strings that are numbers are taken."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        return FAILED


def _to_int(value: int | float | str) -> Any:
    """Whole numbers in any notation: 8, 900e9, 900_000_000_000, 4.0."""
    if isinstance(value, int):
        return value
    try:
        number = Decimal(value)
    except InvalidOperation:
        return FAILED
    if not number.is_finite() or number.adjusted() > MAX_EXPONENT or number != number.to_integral_value():
        return FAILED
    return int(number)


def _typed(hint: Any, text: str, path: str, problems: list[Problem]) -> Any:
    """The value of a command-line text. A key that takes a string gets the text untouched."""
    if hint is str or hint == (str | None):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return _refuse(
            problems, path, text, "is not a YAML value", "quote it for the shell, e.g. 'key=[1, 2]'"
        )


def _type_remedy(hint: type, value: Any) -> str:
    if value is None:
        return "give a value, or remove the key for its default"
    if hint is str and not isinstance(value, (list, Mapping)):
        return f'put it in quotes: "{value}"'
    if hint is int and isinstance(value, float):
        return "round it"
    if isinstance(value, Mapping):
        return "got a section"
    kind = type(value).__name__
    return f"got {'an' if kind == 'int' else 'a'} {kind}"


def _refuse(problems: list[Problem], path: str, value: Any, rule: str, remedy: str) -> Any:
    problems.append(Problem(path, value, rule, remedy))
    return FAILED
