"""A response with its reward, as it is trained on, and what makes one unusable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_vl.errors import DataError
from megatron_vl.generate.request import LENGTH, Prompt, Response

SHOWN = 8  # trajectories that an error lists


@dataclass(frozen=True)
class Trajectory:
    """reward: for the whole response, at its last token. token_rewards: one per response token, added to it.

    masked: the verifier failed, so the trajectory is in no loss and no metric; it is counted. reward_parts: what the
    reward is made of, for the log. source: domain or type of the question.
    """

    prompt: Prompt
    response: Response
    reward: float
    token_rewards: tuple[float, ...] | None = None
    masked: bool = False
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    @property
    def name(self) -> str:
        """What logs and errors call it: prompt and number of the sample."""
        return f"{self.response.prompt_id}/{self.response.sample_index}"

    @property
    def truncated(self) -> bool:
        """Cut at its length limit: no end of its own."""
        return self.response.finish_reason == LENGTH

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.prompt.ids) + len(self.response.tokens)

    def rewards(self) -> list[float]:
        """One reward per response token. A truncated response gets none for its end, whatever the verifier said."""
        rewards = list(self.token_rewards or [0.0] * len(self.response.tokens))
        rewards[-1] += 0.0 if self.truncated else self.reward
        return rewards


def usable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Those that are trained on: all that are not masked.

    Raises:
        DataError: one contradicts itself, or two are the same sample; every one is listed.
    """
    problems = [f"{t.name}: {problem}" for t in trajectories if (problem := _problem(t))]
    seen: set[str] = set()
    for trajectory in trajectories:
        if trajectory.name in seen:
            problems.append(f"{trajectory.name}: is there twice")
        seen.add(trajectory.name)
    if problems:
        raise DataError(f"{len(problems)} trajectories cannot be trained on: {_listed(problems)}")
    return [t for t in trajectories if not t.masked]


def _problem(trajectory: Trajectory) -> str:
    prompt, response = trajectory.prompt, trajectory.response
    length, given = len(response.tokens), trajectory.token_rewards
    if prompt.prompt_id != response.prompt_id:
        return f"stands with prompt {prompt.prompt_id}"
    if not prompt.ids or not length:
        return f"{len(prompt.ids)} prompt and {length} response tokens; both must be there"
    if len(response.logprobs) != length:
        return f"{len(response.logprobs)} log-probabilities for {length} response tokens"
    if given is not None and len(given) != length:
        return f"{len(given)} token rewards for {length} response tokens"
    if trajectory.masked:
        return ""
    numbers = (trajectory.reward, *(given or ()), *response.logprobs)
    return "" if all(map(math.isfinite, numbers)) else "a reward or log-probability that is not finite"


def stale(trajectories: Sequence[Trajectory], version: str) -> list[Trajectory]:
    """Those that other weights than ``version`` have sampled."""
    return [t for t in trajectories if t.response.weight_version != version]


def check_versions(trajectories: Sequence[Trajectory], version: str) -> None:
    """Strict on-policy training: every trained token was sampled by the very weights that it trains.

    Raises:
        DataError: naming the samples of other versions.
    """
    others = stale(trajectories, version)
    if others:
        named = _listed([f"{t.name} by {t.response.weight_version}" for t in others])
        raise DataError(
            f"rl.ppo.strict_on_policy: {len(others)} of {len(trajectories)} trajectories were not sampled by the "
            f"weights {version} that they would train: {named}; sample them again, or set it false"
        )


def _listed(items: Sequence[str]) -> str:
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
