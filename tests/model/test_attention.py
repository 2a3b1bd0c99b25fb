"""`TorchCoreAttention` against attention with explicit masks, and the list of calls that it makes."""

import pytest
import torch

from megatron_vl.model.attention import packed_params, segments
from tests.parallel.on_ranks import attention_errors

DENSE, DOCUMENTS = (0, 32), (0, 16, 24, 40)


@pytest.mark.parametrize("size", [1, 2, 4])
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
def test_causal_attention_forward_and_backward(world, size, bounds, packed, heads, groups, rows):
    for errors in world.run(size, attention_errors, bounds, packed, heads, groups, True, rows):
        assert max(errors) < 2e-5


def test_full_attention(world):
    assert max(world.run(1, attention_errors, DENSE, False, 4, 4, False, 3)[0]) < 2e-5


def test_calls_of_one_rank():
    assert segments((0, 6, 10), 1, 0, causal=True) == [(0, 6, 0, 6, 0), (6, 10, 6, 10, 0)]
    assert segments((0, 6), 1, 0, causal=False) == [(0, 6, 0, 6, None)]
    # chunks 0 and 3 of a document of 8, then of one of 4: keys end where the chunk ends
    assert segments((0, 8, 12), 2, 0, causal=True) == [
        (0, 2, 0, 2, 0), (2, 4, 0, 8, 6), (4, 5, 8, 9, 0), (5, 6, 8, 12, 3),
    ]  # fmt: skip
    assert segments((0, 8), 2, 1, causal=True) == [(0, 2, 0, 4, 2), (2, 4, 0, 6, 4)]
    assert segments((0, 4, 4), 1, 0, causal=True) == [(0, 4, 0, 4, 0)]


def test_zigzag_gives_every_rank_the_same_work():
    for cp in (2, 4):
        work = [
            sum((b - a) * (d - c) for a, b, c, d, _ in segments((0, 64, 96), cp, r, True)) for r in range(cp)
        ]
        assert len(set(work)) == 1


def test_packed_params_hold_padded_and_true_lengths():
    params = packed_params([0, 8, 12, 16], [5, 4, 0], torch.device("cpu"))
    assert params.qkv_format == "thd" and params.bounds == (0, 8, 12, 16)
    assert params.cu_seqlens_q.tolist() == [0, 5, 9, 9] and params.cu_seqlens_q_padded.tolist() == [
        0,
        8,
        12,
        16,
    ]
    assert params.max_seqlen_q == params.max_seqlen_kv == 8  # the longest document, never the row
    assert packed_params(None, [4], torch.device("cpu")) is None
