"""The exchanges of context parallelism, forward and backward, against plain computations."""

import pytest
import torch

from megatron_vl.parallel.context_parallel import global_order, local_index
from tests.parallel.on_ranks import ring_turn, sequence_exchange


@pytest.mark.parametrize("size", [2, 4])
def test_gathered_sequence_and_its_gradient(world, size):
    for answer in world.run(size, sequence_exchange, (0, 16, 40, 48)):
        assert answer == {"forward": True, "backward": True}


def test_a_turn_of_the_ring(world):
    for rank, found in enumerate(world.run(4, ring_turn)):
        before = [(rank - step) % 4 for step in (1, 2, 3, 4)]
        assert found == [(float(r), float(r + 100)) for r in before]


def test_what_a_rank_holds_and_the_way_back():
    bounds = (0, 8, 12)
    held = [local_index(bounds, 2, rank) for rank in (0, 1)]
    assert held[0].tolist() == [0, 1, 6, 7, 8, 11] and held[1].tolist() == [2, 3, 4, 5, 9, 10]
    assert torch.cat(held)[global_order(bounds, 2)].tolist() == list(range(12))
    assert local_index(bounds, 1, 0).tolist() == list(range(12))
