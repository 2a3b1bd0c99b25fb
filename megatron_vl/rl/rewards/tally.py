"""Counts of an iteration's verdicts, and the rule by which missing ones stop the run."""

from __future__ import annotations

import threading
from collections import Counter

from megatron_vl.errors import MegatronVLError
from megatron_vl.rl.rewards.verdict import BAD_GOLD, MINIMUM, Malformed, Ok, Verdict, VerifierError


class TooManyVerifierErrors(MegatronVLError):
    """More verdicts of an iteration are missing than the run allows."""


class Tally:
    """Counts verdicts. total: of the iteration. max_error_share: of it that may be errors. Thread-safe."""

    def __init__(self, total: int, max_error_share: float):
        assert 0.0 <= max_error_share <= 1.0, max_error_share
        self.total, self.max_error_share = total, max_error_share
        self.by_reason: Counter[tuple[str, str, str]] = Counter()  # (kind, outcome, reason)
        self.score_sum, self.right = 0.0, 0
        self.example = ""  # detail of the first error
        self._lock = threading.Lock()

    def add(self, verdict: Verdict, kind: str) -> None:
        """Counts one verdict of a task of this kind."""
        outcome = {Ok: "ok", Malformed: "malformed", VerifierError: "verifier_error"}[type(verdict)]
        reason = "" if isinstance(verdict, Ok) else verdict.reason
        with self._lock:
            self.by_reason[kind, outcome, reason] += 1
            if isinstance(verdict, VerifierError):
                self.example = self.example or f"{verdict.reason}: {verdict.detail}"
            else:
                value = verdict.score if isinstance(verdict, Ok) else MINIMUM
                self.score_sum += value
                self.right += value == 1.0

    def count(self, outcome: str, reason: str | None = None) -> int:
        """How many verdicts had this outcome ("ok", "malformed", "verifier_error"), and this reason if one is given."""
        with self._lock:
            return sum(
                number
                for (_, found, why), number in self.by_reason.items()
                if found == outcome and reason in (None, why)
            )

    @property
    def errors(self) -> int:
        return self.count("verifier_error")

    @property
    def too_many(self) -> bool:
        """Whether the errors so far are more than all of the iteration may have."""
        return self.errors > self.max_error_share * self.total

    def check(self) -> None:
        """Raises TooManyVerifierErrors by the rule of `too_many`."""
        if self.too_many:
            errors, bad = self.errors, self.count("verifier_error", BAD_GOLD)
            remedies = []
            if bad:
                remedies.append(
                    f"mend or leave out the tasks whose gold answer cannot be read ({bad} verdicts)"
                )
            if errors > bad:
                remedies.append("repair the verifier (is the judge's server up? see docs/rewards.md)")
            raise TooManyVerifierErrors(
                f"{errors} of {self.total} verdicts of this iteration are missing, at most a share of "
                f"{self.max_error_share:g} may be; first: {self.example}. {self.summary()}. No update was made from "
                f"them; {', and '.join(remedies)}, then start again"
            )

    def metrics(self) -> dict[str, float]:
        """For the log. Mean score and accuracy are over the verdicts that are not errors; `reason/` counts failures."""
        decided = max(1, self.count("ok") + self.count("malformed"))
        counts = {
            f"rewards/{outcome}": float(self.count(outcome))
            for outcome in ("ok", "malformed", "verifier_error")
        }
        with self._lock:
            reasons: Counter[str] = Counter()
            for (_, outcome, why), number in self.by_reason.items():
                if why:
                    reasons[f"rewards/{outcome}/{why}"] += number
        return {
            "rewards/score": self.score_sum / decided,
            "rewards/accuracy": self.right / decided,
            **counts,
            **{name: float(number) for name, number in sorted(reasons.items())},
        }

    def summary(self) -> str:
        """One line: `3 ok, 1 malformed (truncated 1), 2 verifier errors (judge_timeout 2)`."""
        parts = []
        for outcome, words in (
            ("ok", "ok"),
            ("malformed", "malformed"),
            ("verifier_error", "verifier errors"),
        ):
            reasons: Counter[str] = Counter()
            for (_, found, why), number in list(self.by_reason.items()):
                if found == outcome and why:
                    reasons[why] += number
            listed = ", ".join(f"{why} {number}" for why, number in reasons.most_common())
            parts.append(f"{self.count(outcome)} {words}" + (f" ({listed})" if listed else ""))
        return ", ".join(parts)
