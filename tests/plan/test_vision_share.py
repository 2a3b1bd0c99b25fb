"""Sharing views out: every view once, even shares, and the way back."""

import itertools

import pytest

from megatron_vl.plan.vision_share import CROP, GLOBAL, gathered_order, share_views

ALL_KINDS = [kinds for length in range(8) for kinds in itertools.product((CROP, GLOBAL), repeat=length)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_even_shares_of_every_mix(size):
    for kinds in ALL_KINDS:
        shares = share_views(kinds, size)
        assert sorted(index for share in shares for index in share) == list(range(len(kinds)))
        for wanted in (lambda kind: True, lambda kind: kind == CROP, lambda kind: kind == GLOBAL):
            counts = [sum(wanted(kinds[index]) for index in share) for share in shares]
            assert max(counts) - min(counts) <= 1
        for share in shares:
            crops = [index for index in share if kinds[index] == CROP]
            wholes = [index for index in share if kinds[index] == GLOBAL]
            assert share == sorted(crops) + sorted(wholes)


def test_remainders_do_not_meet():
    kinds = [CROP, CROP, CROP, CROP, CROP, GLOBAL, GLOBAL]
    assert share_views(kinds, 4) == [[0, 5], [1, 6], [2, 3], [4]]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [(1, 4), (2, 3), (0, 1)])
def test_gathered_order_restores_the_stream(size, tokens):
    for kinds in ALL_KINDS:
        concatenation = [
            (view, row)
            for share in share_views(kinds, size)
            for view in share
            for row in range(tokens[kinds[view]])
        ]
        stream = [(view, row) for view, kind in enumerate(kinds) for row in range(tokens[kind])]
        assert [concatenation[row] for row in gathered_order(kinds, size, tokens)] == stream


def test_misuse():
    with pytest.raises(ValueError, match="at least one rank"):
        share_views([CROP], 0)
    with pytest.raises(ValueError, match="every view is CROP"):
        share_views([2], 1)
