"""Off-loaded activations come back as they were; weights and small tensors stay."""

import pytest
import torch

from megatron_vl.model.offload import Offload
from megatron_vl.parity.compare import relative
from tests.fixtures.small import SMALL, make_documents
from tests.model.on_ranks import gradients_with_offload


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *[torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()) for _ in range(3)]
    )


def test_values_and_gradients_are_equal_and_what_is_moved():
    net, x = network(), torch.randn(16, 8) * 2
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    moved = Offload(net.parameters(), smallest=0)
    with moved.saving():
        out = net(x)
    assert torch.equal(out, net(x))
    # of each layer the SiLU's input and the linear's, but for the first one's, which is a leaf; no weight
    assert moved.bytes == 5 * 16 * 8 * 4 and all(away.host.shape == (16, 8) for away in moved.away)
    out.sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected))
    assert all(away.used and away.arrived is None for away in moved.away)


def test_small_tensors_stay_and_a_changed_copy_shows():
    net, x = network(), torch.randn(16, 8)
    small = Offload(net.parameters(), smallest=16 * 8 * 4 + 1)
    with small.saving():
        net(x)
    assert small.bytes == 0
    moved = Offload(net.parameters(), smallest=0)
    with moved.saving():
        out = net(x)
    moved.away[1].host.add_(1.0)
    out.sum().backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    assert not all(torch.equal(p.grad, f) for p, f in zip(net.parameters(), found)), "the copies are not used"


@pytest.mark.parametrize(("layout", "decoder"), [("1", "none"), ("cp2", "full"), ("pp2", "selective")])
def test_a_step_is_equal(world, layout, decoder):
    docs = make_documents(SMALL, [([(0, 0)], 8), ([], 9)])
    plain, nothing = gradients_with_offload(world, SMALL, layout, docs, decoder, offload=False)
    found, moved = gradients_with_offload(world, SMALL, layout, docs, decoder, offload=True)
    assert nothing == 0 < moved
    assert found[0] == plain[0] and set(found[1]) == set(plain[1])
    assert max(relative(found[1][name], grad) for name, grad in plain[1].items()) == 0
