"""Where the values of a run come from: YAML file, command line, and the model's preset or HF config."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_vl.config.convert import Typed
from megatron_vl.config.dump import to_mapping
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.presets import PRESETS
from megatron_vl.errors import ConfigErrors, Problem

COMMAND_LINE = "command line"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str, problems: list[Problem]) -> dict[str, Any]:
    """The sections of a YAML file; {} after a problem, which names the line where that is known."""

    def refuse(where: str, rule: str, remedy: str) -> dict[str, Any]:
        problems.append(Problem(where, None, rule, remedy, show_value=False))
        return {}

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        return refuse(path, f"cannot be read ({error.strerror})", "give the path of a YAML file")
    except UnicodeDecodeError:
        return refuse(path, "is not UTF-8 text", "give the path of a YAML file")
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        return refuse(where, error.problem or "is not YAML", "correct the file there")
    except (yaml.YAMLError, ValueError) as error:
        return refuse(path, f"is not YAML ({error})", "correct the file")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        return refuse(path, "must hold sections of keys", "see examples/pretrain/step3_vl_10b.yaml")
    return tree


def read_overrides(overrides: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    """A tree of `Typed` leaves. Of one key given twice, the later text wins."""
    tree: dict[str, Any] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            problems.append(
                Problem(
                    COMMAND_LINE,
                    text,
                    "is not of the form section.key=value",
                    "write e.g. train.global_batch_size=64",
                )
            )
            continue
        here = tree
        for part in parts[:-1]:
            below = here.get(part)
            if not isinstance(below, dict):
                below = here[part] = {}
            here = below
        here[parts[-1]] = Typed(value)
    return tree


def take_source(name: str, from_file: dict[str, Any], from_line: dict[str, Any]) -> str | None:
    """Takes `preset` or `model_from` out of the trees; the command line wins."""
    in_file = from_file.pop(name, None)
    on_line = from_line.pop(name, None)
    value = on_line.text if isinstance(on_line, Typed) else on_line if on_line is not None else in_file
    return None if value is None else str(value)


def model_layer(source: Mapping[str, str | None], problems: list[Problem]) -> tuple[str, dict[str, Any]]:
    """Origin and tree of the chosen model description; an empty tree stands for the schema's own defaults."""
    preset, directory = source["preset"], source["model_from"]
    if preset is not None and directory is not None:
        problems.append(
            Problem("preset", preset, f"stands beside model_from = {directory}", "keep one of the two")
        )
        return "default", {}
    if preset is not None:
        if preset not in PRESETS:
            near = difflib.get_close_matches(preset, PRESETS, n=1)
            rule = f"must be one of {', '.join(PRESETS)}"
            problems.append(
                Problem("preset", preset, rule, f"did you mean {near[0]}?" if near else "choose one of them")
            )
            return "default", {}
        return f"preset {preset}", _described(PRESETS[preset])
    if directory is not None:
        try:
            return f"file {Path(directory) / 'config.json'}", _described(model_from_hf(directory))
        except ConfigErrors as error:
            problems += error.problems
    return "default", {}


def _described(model: ModelConfig) -> dict[str, Any]:
    """What a preset or an HF config says about a model: all but which parts are frozen."""
    return {"model": {part: to_mapping(getattr(model, part)) for part in ("vision", "text", "tokens")}}
