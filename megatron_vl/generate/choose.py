"""From logits to the next tokens of a batch and their log-probabilities."""

from __future__ import annotations

import torch

from megatron_vl.generate.noise import gumbel
from megatron_vl.generate.request import SamplingParams


def choose(
    logits: torch.Tensor,
    params: SamplingParams,
    forbidden: torch.Tensor,
    seeds: torch.Tensor,
    numbers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row.

    logits: fp32 ``[b, vocabulary]``. forbidden: int64 ids that are not drawn. seeds, numbers: int64 ``[b]``, the
    row's seed and how many tokens it has drawn before. Returns ids int64 ``[b]`` and their log-probabilities fp64
    ``[b]`` under the softmax of ``logits`` as they came: temperature 1, nothing forbidden or cut off.
    """
    allowed = logits.double()
    total = torch.logsumexp(allowed, dim=-1)
    allowed = allowed.index_fill(1, forbidden, -torch.inf)
    if params.temperature > 0:
        allowed = cut_off(allowed / params.temperature, params.top_k, params.top_p)
        allowed = allowed + gumbel(seeds, numbers, allowed.shape[1])
    ids = allowed.argmax(dim=-1)
    return ids, logits.double().gather(1, ids[:, None])[:, 0] - total


def cut_off(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The logits ``[b, vocabulary]`` with -inf where an id is not among the ``top_k`` most probable ones, and then not
    among the fewest whose probabilities, of what is left, add up to ``top_p``. The most probable one always stays;
    ids that are equally probable go by their number.
    """
    if top_k == 0 and top_p == 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < logits.shape[1]:
        ordered[:, top_k:] = -torch.inf
    if top_p < 1.0:
        share = torch.softmax(ordered, dim=-1)
        before = share.cumsum(dim=-1) - share
        keep = before < top_p
        keep[:, 0] = True
        ordered = ordered.masked_fill(~keep, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(1, order, ordered)
