"""The errors that a user can cause, all under `MegatronVLError`.

An error of ours names the value, the rule that it breaks and the remedy. `assert` is kept for invariants of
the code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class MegatronVLError(Exception):
    """Base of every error that the user of the package can cause and repair."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a description.

    path: where it stands, e.g. `parallel.tensor_model_parallel_size` or `recipe.yaml:7`.
    value: what stands there (None together with `show_value=False` when there is nothing to show).
    rule: what must hold. remedy: what to do about it.
    """

    path: str
    value: Any
    rule: str
    remedy: str
    show_value: bool = True

    def __str__(self) -> str:
        head = f"{self.path} = {_shown(self.value)}" if self.show_value else self.path
        return f"{head}: {self.rule}; {self.remedy}"


class ConfigError(MegatronVLError):
    """The description of a run is not one that can be carried out."""


class ConfigErrors(ConfigError):
    """Every problem of one description at once.

    problems: list[Problem], in the order in which they were found. `str()` shows one line for each.
    """

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        assert self.problems, "ConfigErrors needs at least one problem"
        count = len(self.problems)
        title = f"{count} problem{'s' if count > 1 else ''} in the configuration:"
        super().__init__("\n".join([title, *(f"  {problem}" for problem in self.problems)]))


def raise_if_any(problems: Iterable[Problem]) -> None:
    """Raises `ConfigErrors` when there is at least one problem."""
    problems = list(problems)
    if problems:
        raise ConfigErrors(problems)


class DataError(MegatronVLError):
    """A sample, an image or a data file breaks a rule of the data contract."""


class ImageRefused(DataError):
    """One image is not usable.

    reason: short code under which refusals are counted, e.g. `truncated`. detail: the sentence for the log.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class CheckpointError(MegatronVLError):
    """A checkpoint does not fit the model, or is incomplete or damaged."""


def _shown(value: Any) -> str:
    """`value` as it would be typed in YAML, shortened when it is long."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
