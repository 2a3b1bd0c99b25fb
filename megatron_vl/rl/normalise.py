"""Advantages with mean 0 and deviation 1 over the global batch, from sums that ranks can add up."""

from __future__ import annotations

import torch

LEAST_VARIANCE = 1e-8  # as in Open-Reasoner-Zero: equal advantages become 0, not noise of size 1


def moments(values: torch.Tensor) -> torch.Tensor:
    """(sum, sum of squares, count) in fp64; those of several ranks may be added."""
    values = values.double()
    count = torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
    return torch.stack([values.sum(), values.square().sum(), count])


def mean_and_deviation(sums: torch.Tensor) -> tuple[float, float]:
    """From ``moments``: the mean, and the deviation of the population, at least ``sqrt(LEAST_VARIANCE)``."""
    total, squares, count = sums.tolist()
    mean = total / max(count, 1.0)
    variance = squares / max(count, 1.0) - mean * mean
    return mean, max(variance, LEAST_VARIANCE) ** 0.5


def whiten(values: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """``(values - mean) / deviation`` with the global ``moments``, fp64."""
    mean, deviation = mean_and_deviation(sums)
    return (values.double() - mean) / deviation
