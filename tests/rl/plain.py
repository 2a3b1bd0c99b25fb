"""PPO written a second time, in NumPy and plain loops over tokens, from the papers and not from the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Answer:
    """One response as the formulas see it: a number per token. behind: value after the last one."""

    rewards: np.ndarray
    values: np.ndarray
    behind: float = 0.0


def advantages(answer: Answer, gamma: float, lam: float) -> np.ndarray:
    """The recursion of arXiv 1506.02438, from the last token to the first."""
    found, later, following = np.zeros(len(answer.values)), 0.0, answer.behind
    for t in reversed(range(len(answer.values))):
        delta = answer.rewards[t] + gamma * following - answer.values[t]
        later = delta + gamma * lam * later
        found[t], following = later, answer.values[t]
    return found


def returns(answer: Answer, gamma: float, lam: float) -> np.ndarray:
    return advantages(answer, gamma, lam) + answer.values


def whitened(per_answer: list[np.ndarray], least_variance: float = 1e-8) -> list[np.ndarray]:
    """Over the tokens of all answers together."""
    everything = np.concatenate(per_answer)
    deviation = math.sqrt(max(everything.var(), least_variance))
    return [(a - everything.mean()) / deviation for a in per_answer]


def policy_token_loss(
    logprob: float,
    old: float,
    sampler: float,
    advantage: float,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
    tis: float | None = None,
) -> tuple[float, float]:
    """(loss, its derivative by the log-probability) of one token, case by case."""
    ratio = math.exp(logprob - old)
    weight = 1.0 if tis is None else min(math.exp(old - sampler), tis)
    if advantage >= 0:
        value, moves = (1 + high, False) if ratio > 1 + high else (ratio, True)
    elif ratio < 1 - low:
        value, moves = 1 - low, False
    elif dual is not None and ratio > dual:
        value, moves = dual, False
    else:
        value, moves = ratio, True
    loss = -weight * value * advantage
    return loss, (loss if moves else 0.0)


def value_token_loss(value: float, old: float, target: float, clip: float | None) -> float:
    plain = (value - target) ** 2 / 2
    if clip is None:
        return plain
    near = min(max(value, old - clip), old + clip)
    return max(plain, (near - target) ** 2 / 2)


def kl_token(logprob: float, other: float, form: str) -> float:
    difference = logprob - other
    return {
        "k1": difference,
        "k2": difference**2 / 2,
        "k3": math.exp(other - logprob) - 1 - (other - logprob),
    }[form]
