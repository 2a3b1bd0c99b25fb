"""PyTorch's variable-length flash operators, in their arguments and by definition, where there is no CUDA device."""

from __future__ import annotations

import math

import torch


class StandIn:
    """Checks what it is given and computes it with masks."""

    FORWARD = [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask",
    ]  # fmt: skip
    BACKWARD = [
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k",
        "dropout_p", "is_causal", "rng_state", "unused",
    ]  # fmt: skip

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None):
        self._check(q, k, v, cu_q, cu_k, max_q, max_k, dropout)
        assert debug is False
        outs, sums = [], []
        for share, lse, _, values, *_ in self._sequences(q, k, v, cu_q, cu_k, causal, scale):
            outs.append(torch.einsum("nqk,knd->qnd", share, values))
            sums.append(lse)
        nothing = torch.zeros(2, dtype=torch.uint64)
        return torch.cat(outs), torch.cat(sums, 1), nothing, torch.empty(0), torch.empty(0)

    def backward(
        self, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale=None
    ):
        self._check(q, k, v, cu_q, cu_k, max_q, max_k, dropout)
        assert rng.dtype == torch.uint64 and rng.shape == (2,) and unused.numel() == 0
        assert lse.is_contiguous() and grad.stride(-1) == out.stride(-1) == 1
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        repeats = q.shape[1] // k.shape[1]
        found = self._sequences(q, k, v, cu_q, cu_k, causal, scale, lse)
        for share, _, keys, values, queries, rows in found:
            delta = (grad[queries] * out[queries]).sum(-1).T.unsqueeze(-1)
            slope = share * (torch.einsum("qnd,knd->nqk", grad[queries], values) - delta) * scale
            dq[queries] = torch.einsum("nqk,knd->qnd", slope, keys)
            for total, x in (
                (dk, torch.einsum("nqk,qnd->knd", slope, q[queries])),
                (dv, torch.einsum("nqk,qnd->knd", share, grad[queries])),
            ):
                total[rows] = x.unflatten(1, (-1, repeats)).sum(2)
        return dq, dk, dv

    def _check(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout) -> None:
        self.calls += 1
        for x, cu, longest in ((q, cu_q, max_q), (k, cu_k, max_k)):
            assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == x.shape[0]
            assert longest == cu.diff().max().item() and x.stride(-1) == 1
        assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0 and dropout == 0.0

    def _sequences(self, q, k, v, cu_q, cu_k, causal, scale, lse=None):
        repeats = q.shape[1] // k.shape[1]
        for (a, b), (c, d) in zip(zip(cu_q, cu_q[1:]), zip(cu_k, cu_k[1:])):
            queries, rows = slice(int(a), int(b)), slice(int(c), int(d))
            keys, values = (x[rows].repeat_interleave(repeats, 1) for x in (k, v))
            scores = torch.einsum("qnd,knd->nqk", q[queries], keys) * scale
            if causal:
                last = (d - c) - (b - a)
                visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(int(last))
                scores = scores.masked_fill(~visible, -math.inf)
            sums = scores.logsumexp(-1) if lse is None else lse[:, queries]
            yield (scores - sums.unsqueeze(-1)).exp(), sums, keys, values, queries, rows
