"""Cutting rows for context parallelism."""

import pytest

from megatron_vl.plan.sequence import row_multiple, zigzag


@pytest.mark.parametrize(
    ("tp", "cp", "sp", "expected"),
    [(1, 1, False, 1), (4, 1, False, 1), (4, 1, True, 4), (4, 2, False, 4), (2, 3, True, 12)],
)
def test_row_multiple(tp, cp, sp, expected):
    assert row_multiple(tp, cp, sp) == expected


def test_one_document():
    assert zigzag([0, 8], 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_documents_keep_their_order():
    assert zigzag([0, 4, 12], 2) == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]


def test_one_rank_holds_everything_in_order():
    assert zigzag([0, 3, 10], 1) == [list(range(10))]


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_every_token_once_and_equal_causal_work(cp):
    cu_seqlens = [0, 2 * cp, 8 * cp, 8 * cp, 18 * cp]
    held = zigzag(cu_seqlens, cp)
    assert sorted(token for rank in held for token in rank) == list(range(cu_seqlens[-1]))
    start = {token: begin for begin, end in zip(cu_seqlens, cu_seqlens[1:]) for token in range(begin, end)}
    work = {sum(token - start[token] + 1 for token in rank) for rank in held}
    assert len(work) == 1


def test_a_document_that_does_not_divide():
    with pytest.raises(ValueError, match="document of 6 tokens: .* multiple of 4; pad it to 8"):
        zigzag([0, 4, 10], 2)
