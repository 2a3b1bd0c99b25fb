"""The stream of a domain: the same order as `SampleOrder`, found by position and by tokens."""

import numpy as np
import pytest

from megatron_vl.data.order import SampleOrder
from megatron_vl.data.streams import DomainStream, domain_order, sample_indices
from megatron_vl.errors import DataError


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 65_537])
@pytest.mark.parametrize("seed", [0, -5, 2**70 + 3])
def test_is_sample_order_over_arrays(size, seed):
    order = SampleOrder(size, seed)
    positions = np.concatenate([np.arange(100), [3 * size - 1, 10**12 + 5]])
    assert sample_indices(order, positions).tolist() == [order.index(int(p)) for p in positions]
    in_file_order = SampleOrder(size, seed, shuffle=False)
    assert sample_indices(in_file_order, positions).tolist() == (positions % size).tolist()


@pytest.mark.parametrize("tokens", [[3, 0, 5, 0, 2], [1], [0, 0, 4], [7, 7, 7, 7]])
def test_places_by_tokens(tokens):
    stream = DomainStream("a", np.array(tokens), seed=1)
    before = np.concatenate([[0], np.cumsum([tokens[stream.order.index(p)] for p in range(40)])])
    assert [stream.tokens_before(p) for p in range(41)] == before.tolist()
    for wanted in range(int(before[30])):
        assert stream.position_of(wanted) == int(np.argmax(before >= wanted)), wanted
    assert stream.indices(3, 9).tolist() == [stream.order.index(p) for p in range(3, 9)]


def test_domains_of_equal_size_have_orders_of_their_own():
    one, other = ([domain_order(name, 50, 3).index(p) for p in range(50)] for name in ("a", "b"))
    assert sorted(one) == sorted(other) == list(range(50)) and one != other


def test_a_domain_without_tokens_is_an_error():
    with pytest.raises(DataError, match="domain web is empty: none of its 3 samples"):
        DomainStream("web", np.zeros(3, dtype=np.int32), 1)
