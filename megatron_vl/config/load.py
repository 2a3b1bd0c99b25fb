"""A run description from YAML and `section.key=value`, with the origin of every value.

Order, later wins: defaults of the schema, model preset or HF config, YAML file, command line. At the root of
the file (or on the command line) `preset: NAME` or `model_from: DIR` chooses where the model description
comes from; both only fill in `model.*`, and keys of the file win over them.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from megatron_vl.config.convert import Typed, join, to_dataclass
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.sources import COMMAND_LINE, model_layer, read_overrides, read_yaml, take_source
from megatron_vl.errors import Problem, raise_if_any

MODEL_SOURCES = ("preset", "model_from")


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run description and, for each key path, where its value comes from.

    origins: `default`, `preset NAME`, `file F` or `command line` for every leaf, e.g.
    `model.text.num_layers`.
    """

    config: RunConfig
    origins: dict[str, str]


def load_run(
    path: str | None = None,
    overrides: Sequence[str] = (),
    model_from: str | None = None,
    checks: Callable[[RunConfig], Iterable[Problem]] | None = None,
) -> LoadedRun:
    """Reads a run.

    path: YAML file, or None for defaults. overrides: `section.key=value` texts. model_from: folder with an HF
    config.json, as if the file said `model_from`. checks: rules between keys; `plan.checks.load_checked_run`
    passes those of the plan. Raises ConfigErrors with every problem of the description.
    """
    problems: list[Problem] = []
    from_file = read_yaml(path, problems) if path else {}
    from_line = read_overrides(overrides, problems)
    source = {name: take_source(name, from_file, from_line) for name in MODEL_SOURCES}
    if model_from is not None:
        source["model_from"] = model_from
    layers = [model_layer(source, problems), (f"file {path}", from_file), (COMMAND_LINE, from_line)]
    sources_are_whole = not problems
    tree: dict[str, Any] = {}
    origins = dict.fromkeys(leaf_paths(RunConfig), "default")
    for origin, layer in layers:
        _merge(tree, layer, "", origin, origins)
    config = to_dataclass(RunConfig, tree, "", problems)
    problems = [_pointed_elsewhere(problem) for problem in problems]
    if checks is not None and sources_are_whole:
        problems += _independent(checks(config), problems)
    raise_if_any(problems)
    return LoadedRun(config, origins)


def leaf_paths(cls: type, path: str = "") -> Iterator[str]:
    """Paths of all keys below `cls` that are not sections, e.g. `parallel.device`, in schema order."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        here = join(path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaf_paths(hints[field.name], here)
        else:
            yield here


def _merge(
    tree: dict[str, Any], layer: Mapping[Any, Any], path: str, origin: str, origins: dict[str, str]
) -> None:
    """Lays `layer` over `tree` in place. Sections merge key by key, everything else is replaced."""
    for raw_name, value in layer.items():
        name = str(raw_name)
        here = join(path, name)
        if isinstance(value, Typed) and here not in origins:
            value = _opened(value)
        if isinstance(value, Mapping) and here not in origins:
            if tree.get(name) is None:
                tree[name] = {}
            if isinstance(tree[name], dict):  # otherwise an earlier layer is wrong there, and will be refused
                _merge(tree[name], value, here, origin, origins)
        elif value is None and isinstance(tree.get(name), dict):
            continue  # a section with no key below it changes nothing
        else:
            tree[name] = value
            if here in origins:
                origins[here] = origin


def _opened(value: Typed) -> Any:
    """A whole section typed on the command line, e.g. `parallel={device: cpu}`."""
    try:
        parsed = yaml.safe_load(value.text)
    except yaml.YAMLError:
        return value
    return parsed if isinstance(parsed, dict) else value


def _pointed_elsewhere(problem: Problem) -> Problem:
    """An unknown key that exists under the same name in another section: say where."""
    if problem.rule != "unknown key" or "did you mean" in problem.remedy:
        return problem
    name = problem.path.rpartition(".")[2]
    elsewhere = [leaf for leaf in leaf_paths(RunConfig) if leaf.rpartition(".")[2] == name]
    if not elsewhere:
        return problem
    return dataclasses.replace(problem, remedy=f"did you mean {elsewhere[0]}?")


def _independent(found: Iterable[Problem], earlier: Sequence[Problem]) -> list[Problem]:
    """The problems that do not concern a refused key, which stands at its default meanwhile."""
    keys = {problem.path.partition("[")[0].rpartition(".")[2] for problem in earlier}
    keys |= {
        problem.remedy.removeprefix("did you mean ").rstrip("?").rpartition(".")[2]
        for problem in earlier
        if problem.remedy.startswith("did you mean ")
    }
    return [problem for problem in found if not any(key in f"{problem.path} {problem.rule}" for key in keys)]
