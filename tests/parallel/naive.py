"""Attention with explicit masks, one document at a time."""

from __future__ import annotations

import math

import torch


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: tuple[int, ...], causal: bool):
    """q `[S, b, n, d]`, k and v `[S, b, g, d]` -> `[S, b, n * d]`; documents see only themselves."""
    length, rows, heads, width = q.shape
    repeats = heads // k.shape[2]
    out = torch.zeros(length, rows, heads, width)
    for start, end in zip(bounds, bounds[1:]):
        for row in range(rows):
            for head in range(heads):
                keys, values = (x[start:end, row, head // repeats] for x in (k, v))
                scores = q[start:end, row, head] @ keys.T / math.sqrt(width)
                if causal:
                    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
                out[start:end, row, head] = torch.softmax(scores, -1) @ values
    return out.flatten(2)
