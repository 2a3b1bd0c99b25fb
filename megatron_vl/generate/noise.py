"""Random numbers as a function of (seed, number of the token, id): no state, the same on any device.

A response therefore does not depend on who else is in the batch, nor on how often a batch was rebuilt. The mixing is
the finaliser of SplitMix64 (Steele, Lea and Flood 2014) on 64-bit integers, whose products wrap in torch.
"""

from __future__ import annotations

import torch

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = (1 << 64) - 1


def signed(value: int) -> int:
    """The integer of 64 bits as torch's int64 holds it."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, elementwise on int64: every bit of the result follows from all of ``x``."""
    x = (x ^ _shift(x, 30)) * signed(FIRST)
    x = (x ^ _shift(x, 27)) * signed(SECOND)
    return x ^ _shift(x, 31)


def uniform(seeds: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """fp64 ``[b, count]`` inside (0, 1): row r is that of (seeds[r], numbers[r]); both are int64 ``[b]``."""
    keys = mix(mix(seeds * signed(GOLDEN)) + numbers * signed(GOLDEN))
    columns = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64)
    bits = mix(keys[:, None] + columns * signed(GOLDEN))
    return (_shift(bits, 11).double() + 0.5) * 2.0**-53


def gumbel(seeds: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Gumbel noise, fp64 ``[b, count]``: ``argmax(logits + gumbel)`` is a draw from ``softmax(logits)``.

    A rounding difference d of the logits changes the drawn id with a probability of about d only, however large the
    vocabulary is; walking along a cumulative sum would add up the differences of all ids.
    """
    return -torch.log(-torch.log(uniform(seeds, numbers, count)))


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift to the right that brings in zeros: torch's own repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
