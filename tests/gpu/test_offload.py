"""Off-load on one GPU: equal values and gradients, and less memory between forward and backward pass."""

from __future__ import annotations

import pytest
import torch

from megatron_vl.model.offload import Offload

pytestmark = pytest.mark.gpu


def test_values_gradients_and_memory():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)]).cuda()
    x = torch.randn(8192, 1024, device="cuda")
    kept, gradients = [], []
    for move in (False, True):
        net.zero_grad()
        before = torch.cuda.memory_allocated()
        if move:
            with Offload(net.parameters()).saving():
                out = net(x).sum()
        else:
            out = net(x).sum()
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated() - before)
        out.backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert kept[1] < kept[0] / 4
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
