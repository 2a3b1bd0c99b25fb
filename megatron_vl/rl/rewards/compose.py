"""From a verdict to the reward that is trained on: score plus signed penalties, each logged by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vl.errors import Problem, raise_if_any
from megatron_vl.rl.rewards.language import language_penalty
from megatron_vl.rl.rewards.task import Task
from megatron_vl.rl.rewards.verdict import MINIMUM, VERSION, Malformed, Ok, Verdict, VerifierError


@dataclass(frozen=True)
class RewardWeights:
    """score: what a right answer is worth. language: the most that another script than the prompt's costs, 0 for never.

    language_share: of words in the prompt's script from which nothing is deducted.
    """

    score: float = 1.0
    language: float = 0.0
    language_share: float = 0.8

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.score < float("inf"):
            problems.append(Problem("rl.rewards.score", self.score, "must be above 0", "use 1"))
        if not 0 <= self.language < self.score:
            remedy = "lower it: a right answer must stay better than a wrong one"
            problems.append(
                Problem(
                    "rl.rewards.language", self.language, "must be from 0 to below rl.rewards.score", remedy
                )
            )
        if not 0 < self.language_share <= 1:
            problems.append(
                Problem("rl.rewards.language_share", self.language_share, "must be in (0, 1]", "use 0.8")
            )
        raise_if_any(problems)

    @property
    def lowest(self) -> float:
        """The minimum of the range: no score, and every penalty in full."""
        return self.score * MINIMUM - self.language


@dataclass(frozen=True)
class Reward:
    """total: what is trained on. parts: for the log, not summed. penalties: signed, at most 0 each.

    masked: the verifier failed, so the sample is left out of loss and metrics; total is then `lowest`, for no reader to
    mistake. outcome, reason: of the verdict. verifier, version, task: what judged it, see `Task.digest`.
    """

    total: float
    score: float
    parts: Mapping[str, float]
    penalties: Mapping[str, float]
    masked: bool
    outcome: str
    reason: str
    verifier: str
    version: int
    task: str


def compose(task: Task, verdict: Verdict, prompt: str, response: str, weights: RewardWeights) -> Reward:
    """The reward of one response. prompt: text of the question, for its language. response: the whole response.

    Malformed and truncated responses get the lowest reward there is, with every penalty in full: an honest wrong answer
    in the wrong language is never worse than no answer.
    """
    about = {"verifier": task.kind, "version": VERSION, "task": task.digest}
    if isinstance(verdict, Ok):
        penalties = {}
        if weights.language:
            share = language_penalty(prompt, response, weights.language_share)
            penalties["language"] = -weights.language * share
        total = weights.score * verdict.score + sum(penalties.values())
        return Reward(total, verdict.score, verdict.parts, penalties, False, "ok", "", **about)
    masked = isinstance(verdict, VerifierError)
    assert masked or isinstance(verdict, Malformed)
    penalties = {"language": -weights.language} if weights.language and not masked else {}
    outcome = "verifier_error" if masked else "malformed"
    return Reward(weights.lowest, MINIMUM, {}, penalties, masked, outcome, verdict.reason, **about)
