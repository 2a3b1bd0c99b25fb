"""A configuration as plain data and as YAML, which loads to the same configuration again."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Lists inside sections are indented, as people write them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested dictionaries and lists of plain values, in the order of the schema."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """YAML text of a configuration, e.g. for the run folder."""
    return dump_yaml(to_mapping(config))


def dump_yaml(mapping: dict[str, Any]) -> str:
    """YAML text of sections of a configuration as plain data."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
