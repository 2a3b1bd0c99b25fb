"""What a verifier can say of a response: a score, that there is no answer, or that it could not find out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Raised whenever the same task and response could get another verdict than before; stored with every reward.
VERSION = 2
# The lowest score of every verifier: what malformed and truncated responses get.
MINIMUM = 0.0
# Reason of a VerifierError that is the data's fault: the gold answer of the task cannot be read.
BAD_GOLD = "bad_gold"

SHOWN = 120  # characters of a response that a verdict repeats


@dataclass(frozen=True)
class Ok:
    """An answer was found and judged. score: in [0, 1]. parts: what it was made of, each in [0, 1], for the log."""

    score: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert 0.0 <= self.score <= 1.0, f"a score of {self.score} is outside [0, 1]"


@dataclass(frozen=True)
class Malformed:
    """The response holds no answer of the form that was asked for: it gets `MINIMUM`.

    reason: short code under which it is counted. detail: a sentence for the log.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class VerifierError:
    """The verifier failed, the response may be right or wrong: it is left out of the loss, and counted."""

    reason: str
    detail: str = ""


Verdict = Ok | Malformed | VerifierError


class NotAnAnswer(ValueError):
    """Raised by what reads answers; `score` turns it into `Malformed` with the same reason and detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def shown(text: str) -> str:
    """The text as one short line."""
    line = ascii(text)
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."
