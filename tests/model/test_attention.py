"""`TorchCoreAttention` against attention with explicit masks, in both exchanges of K and V."""

import pytest
import torch

from megatron_vl.model.attention import packed_params
from tests.parallel.on_ranks import attention_errors

DENSE, DOCUMENTS = (0, 32), (0, 16, 24, 40)


@pytest.mark.parametrize(
    ("size", "exchange"), [(1, "p2p"), (2, "p2p"), (4, "p2p"), (2, "all_gather"), (4, "all_gather")]
)
@pytest.mark.parametrize(
    ("bounds", "packed", "heads", "groups", "rows"),
    [
        (DENSE, False, 4, 4, 2),
        (DENSE, False, 4, 2, 1),
        (DOCUMENTS, True, 4, 1, 1),
        (DOCUMENTS, True, 6, 2, 1),
    ],
    ids=["dense", "dense-gqa", "packed-mqa", "packed-gqa"],
)
def test_causal_attention_forward_and_backward(world, size, exchange, bounds, packed, heads, groups, rows):
    for errors in world.run(size, attention_errors, bounds, packed, heads, groups, True, rows, exchange):
        assert max(errors) < 2e-5


def test_full_attention(world):
    assert max(world.run(1, attention_errors, DENSE, False, 4, 4, False, 3, "p2p")[0]) < 2e-5


def test_packed_params_hold_padded_lengths():
    params = packed_params([0, 8, 12, 16], [5, 4, 0], torch.device("cpu"))
    assert params.qkv_format == "thd" and params.bounds == (0, 8, 12, 16)
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_q_padded.tolist() == [0, 8, 12, 16]
    assert params.max_seqlen_q == params.max_seqlen_kv == 8  # the longest document, never the row
    assert packed_params(None, [4], torch.device("cpu")) is None
