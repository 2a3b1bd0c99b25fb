"""The configuration keys that docs/rewards.md names exist, and those of the judge are named and passed on."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from megatron_vl.config.rl import JudgeConfig
from megatron_vl.config.schema import RunConfig
from megatron_vl.rl.run import server_settings

PAGE = Path(__file__).parents[3] / "docs" / "rewards.md"


def dotted_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """`section.key` of everything in the configuration."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from dotted_keys(hint, f"{prefix}{name}.")


def strangers(text: str) -> set[str]:
    """Dotted words between backquotes that look like keys, by their first or second part, and are none."""
    keys = set(dotted_keys())
    parts = {part for key in keys for part in key.split(".")[:2]}
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)\.?`", text))
    return {
        name
        for name in named
        if name.split(".")[0] in parts and name not in keys and not name.endswith(".py")
    }


def test_every_key_of_the_page_exists():
    text = PAGE.read_text()
    assert "`rl.rewards.score`" in text and strangers(text) == set()
    assert strangers("`rewards.score`, `rl.rewards.scores`, `rl.rewards.judge.`, `score.py`") == {
        "rewards.score",
        "rl.rewards.scores",
    }


def test_the_settings_of_the_judge_are_on_the_page_and_reach_the_server():
    table = PAGE.read_text().split("| `rl.rewards.judge.` |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)`", table))
    fields = {field.name: field.default for field in dataclasses.fields(JudgeConfig)}
    assert named == set(fields)
    for name, default in fields.items():
        other = {str: "http://other/v1", int: 7, float: 7.5}[type(default)]
        judge = JudgeConfig(
            **{"base_url": "http://judge/v1", "model": "m", name: "" if "env" in name else other}
        )
        assert getattr(server_settings(judge), name) == getattr(judge, name)
