"""The order of samples: a permutation per epoch, and the same samples per step in every layout."""

import pytest

from megatron_vl.data.order import SampleOrder, permuted, rows_for_step
from megatron_vl.errors import DataError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_each_epoch_is_a_permutation(size):
    order = SampleOrder(size, seed=7)
    epochs = [[order.index(epoch * size + n) for n in range(size)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size >= 16:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(size))


def test_is_pinned():
    """A changed order would break the resumption of every run; the values are those of the first version."""
    first, second = [4, 5, 8, 6, 1, 2, 0, 3, 7, 9], [9, 1, 6, 8, 2, 3, 5, 4, 0, 7]
    assert [SampleOrder(10, seed=1234).index(n) for n in range(20)] == first + second
    assert [SampleOrder(10, seed=1235).index(n) for n in range(10)] != first
    assert SampleOrder(10**12, seed=0).index(3 * 10**12 + 5) == 333_406_205_949


def test_positions_are_spread_evenly():
    """Where sample 0 of 8 ends up over 4,000 keys: 500 expected in each place, standard deviation 21."""
    counts = [0] * 8
    for key in range(4000):
        counts[permuted(0, 8, key)] += 1
    assert min(counts) > 400 and max(counts) < 600


def test_neighbours_are_independent():
    order = SampleOrder(997, seed=3)
    steps = [(order.index(n + 1) - order.index(n)) % 997 for n in range(996)]
    assert len(set(steps)) > 500


def test_file_order():
    order = SampleOrder(3, seed=1, shuffle=False)
    assert [order.index(n) for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_same_samples_in_a_step_for_any_layout(dp_size, micro_batch_size):
    for step in (0, 5):
        rows = [rows_for_step(step, 24, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
        assert sorted(n for rank in rows for row in rank for n in row) == list(
            range(step * 24, step * 24 + 24)
        )
        assert {len(row) for rank in rows for row in rank} == {micro_batch_size}
        assert {len(rank) for rank in rows} == {24 // dp_size // micro_batch_size}


def test_bad_arguments():
    with pytest.raises(ValueError, match="multiple of micro_batch_size x data-parallel size = 2 x 4"):
        rows_for_step(0, 12, 2, 0, 4)
    with pytest.raises(DataError, match="num_samples = 0"):
        SampleOrder(0, seed=1)
