"""Generalised advantage estimation over responses of any lengths, in fp64 and without a loop over tokens.

With ``delta_t = r_t + gamma V_{t+1} - V_t`` the advantage is ``A_t = delta_t + gamma lambda A_{t+1}`` (Schulman et
al., arXiv 1506.02438), and the return that the critic learns is ``G_t = A_t + V_t``. ``V_t`` is the value of the state
in which token ``t`` is chosen; behind the last token it is 0, or the critic's value where a cut response is
bootstrapped. With gamma = lambda = 1 and a reward ``R`` at the end only, ``G_t = R`` and ``A_t = R - V_t``.
"""

from __future__ import annotations

import torch


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    behind: torch.Tensor,
    gamma: float,
    lam: float,
) -> torch.Tensor:
    """Advantages, fp64 ``[n]``, of responses that stand one behind the other.

    rewards, values: ``[n]``, per token. lengths: int64 ``[k]``, tokens of each response, none 0. behind: ``[k]``,
    value behind the last token of each.
    """
    rewards, values, behind = rewards.double(), values.double(), behind.double()
    following = values.roll(-1)
    following[lengths.cumsum(0) - 1] = behind
    return discounted_sums(rewards + gamma * following - values, lengths, gamma * lam)


def discounted_sums(terms: torch.Tensor, lengths: torch.Tensor, factor: float) -> torch.Tensor:
    """``sum over i of factor^i terms[t + i]`` up to the end of each segment, fp64 ``[n]``.

    By doubling: after pass ``k`` each entry holds the sum over ``2^k`` terms, so 16 passes do for 65,536 tokens.
    """
    if not len(lengths):
        return terms.double()
    assert int(lengths.min()) > 0 and int(lengths.sum()) == len(terms), "segments do not cover the terms"
    left = torch.cat(
        [torch.arange(int(n), 0, -1) for n in lengths]
    )  # tokens up to the end, this one included
    sums, reach, power = terms.double().clone(), 1, factor
    while reach < int(lengths.max()):
        inside = (left > reach).nonzero().squeeze(1)
        sums = sums.index_add(0, inside, power * sums[inside + reach])
        reach, power = 2 * reach, power * power
    return sums
