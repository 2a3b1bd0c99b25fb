"""How often the responses to a prompt were accepted: the four classes, and what filtration keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALL, SOME, SOME_REJECTED, NONE = "all_accept", "some_accept", "some_reject", "all_fail"
CLASSES = (ALL, SOME, SOME_REJECTED, NONE)
UNKNOWN = "no_verdict"


@dataclass(frozen=True)
class Acceptance:
    """Of one prompt. rewards: of the responses that have a verdict. masked: responses without one."""

    rewards: tuple[float, ...]
    masked: int
    accept_at: float = 1.0

    @property
    def accepted(self) -> int:
        """Responses whose reward reaches ``accept_at``."""
        return sum(reward >= self.accept_at for reward in self.rewards)

    @property
    def rate(self) -> float:
        """Share of accepted responses among those with a verdict; 0 without any."""
        return self.accepted / len(self.rewards) if self.rewards else 0.0

    @property
    def kind(self) -> str:
        """all_accept, some_accept (at least half), some_reject (fewer, but one), all_fail, or no_verdict.

        StepFun logs four classes (spec/rl.md section 4); where its two middle ones part is not published: half is
        ours. The difficulty rule below takes both.
        """
        if not self.rewards:
            return UNKNOWN
        if self.accepted == len(self.rewards):
            return ALL
        if self.accepted == 0:
            return NONE
        return SOME if 2 * self.accepted >= len(self.rewards) else SOME_REJECTED


def keeps(acceptance: Acceptance, min_rate: float = 0.0, max_rate: float = 1.0, strict: bool = True) -> bool:
    """Whether a prompt is neither always right nor always wrong, and its rate lies between the bounds.

    strict: the bounds themselves are out, as the some-accept rule asks (0 < rate < 1).
    """
    if acceptance.kind == UNKNOWN:
        return False
    rate = acceptance.rate
    return min_rate < rate < max_rate if strict else min_rate <= rate <= max_rate


def class_counts(prompts: Mapping[str, Acceptance]) -> dict[str, int]:
    """How many prompts are in each class."""
    counts = dict.fromkeys((*CLASSES, UNKNOWN), 0)
    for acceptance in prompts.values():
        counts[acceptance.kind] += 1
    return counts


def by_prompt(results: Sequence[tuple[str, float, bool]], accept_at: float = 1.0) -> dict[str, Acceptance]:
    """results: (prompt id, reward, masked) of every response, in any order."""
    rewards: dict[str, list[float]] = {}
    masked: dict[str, int] = {}
    for prompt_id, reward, is_masked in results:
        rewards.setdefault(prompt_id, [])
        masked.setdefault(prompt_id, 0)
        if is_masked:
            masked[prompt_id] += 1
        else:
            rewards[prompt_id].append(reward)
    return {p: Acceptance(tuple(rewards[p]), masked[p], accept_at) for p in rewards}
