"""How a configuration key is declared: its default, one sentence about it, and the values that make sense."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Which values a key takes, beyond its type. Bounds apply to the elements of a list."""

    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def broken_rule(self, value: Any) -> str | None:
        """The rule that `value` breaks, as a phrase, or None."""
        if value is None:
            return None
        if isinstance(value, list):
            return next((rule for rule in map(self.broken_rule, value) if rule), None)
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(map(str, self.choices))}"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least}"
        if self.above is not None and value <= self.above:
            return f"must be greater than {self.above}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most}"
        if self.below is not None and value >= self.below:
            return f"must be less than {self.below}"
        return None


def key(doc: str, default: Any = MISSING, *, factory: Callable[[], Any] | None = None, **limits: Any) -> Any:
    """A dataclass field that is a configuration key. `limits` are the fields of `Limits`."""
    metadata = {"doc": doc, "limits": Limits(**limits)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)
