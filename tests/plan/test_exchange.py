"""Bytes of the exchange of K and V: what is planned against what the live code hands on, on one of four ranks."""

from types import SimpleNamespace

import pytest
import torch

from megatron_vl.ops import context_attention
from megatron_vl.plan.exchange import Exchange, exchange_of
from megatron_vl.plan.kernels import kernels_of

RANKS, ROWS, HEADS, GROUPS, WIDTH = 4, 8, 4, 2, 16
GROUP = SimpleNamespace(size=lambda: RANKS, rank=lambda: 1)


def size_of(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


class Recorded:
    """In place of what sends: counts the bytes, and gives something of the right shape back."""

    def __init__(self, monkeypatch) -> None:
        self.sent: list[float] = []
        monkeypatch.setattr(context_attention, "gather_rows", self.gather)
        monkeypatch.setattr(context_attention, "sum_and_scatter_rows", self.scatter)
        monkeypatch.setattr(context_attention, "Passing", self.passing)

    def gather(self, x, group):
        self.sent.append((RANKS - 1) * size_of(x))
        return torch.cat([x] * RANKS)

    def scatter(self, x, group):
        self.sent.append((RANKS - 1) / RANKS * size_of(x))
        return x[: len(x) // RANKS]

    def passing(self, x, group, tag):
        self.sent.append(size_of(x))
        return SimpleNamespace(received=x.clone)

    def taken(self) -> list[float]:
        sent, self.sent = self.sent, []
        return sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exchange", ["p2p", "all_gather"])
def test_bytes_of_the_live_code(monkeypatch, exchange, dtype):
    recorded = Recorded(monkeypatch)
    q, k, v = (torch.randn(ROWS, n, WIDTH, dtype=dtype, requires_grad=True) for n in (HEADS, GROUPS, GROUPS))
    kernels = kernels_of("torch", dtype.itemsize, True, exchange)
    planned = exchange_of(kernels, RANKS, RANKS * (size_of(k) + size_of(v)))
    out = context_attention.attention(q, k, v, (0, RANKS * ROWS), 0.25, True, GROUP, exchange)
    assert sum(recorded.taken()) == planned.forward
    out.sum().backward()
    sent = recorded.taken()
    assert sum(sent) == planned.backward + planned.home
    if exchange == "p2p":
        assert sent[-1] == planned.home  # after the last computation


def test_transformer_engine_keeps_the_format_of_k_and_v():
    for exchange in ("p2p", "all_gather"):
        assert exchange_of(kernels_of("transformer_engine", 2, False, exchange), 4, 400.0) == Exchange(
            300, 600
        )
