"""What differs between two resolved configurations, key by key."""

from __future__ import annotations

from typing import Any

from megatron_vl.config.dump import to_mapping
from megatron_vl.config.schema import RunConfig


def changed_keys(before: RunConfig, now: RunConfig) -> list[str]:
    """``section.key: old -> new`` of every value that differs, in the order of the schema."""
    return _changed("", to_mapping(before), to_mapping(now))


def _changed(path: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in _changed(f"{path}.{key}" if path else key, before.get(key), now.get(key))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now))
        return [line for n, (old, new) in pairs for line in _changed(f"{path}[{n}]", old, new)]
    return [] if before == now else [f"{path}: {before} -> {now}"]
