"""The chunk of the loss follows from the vocabulary of a rank."""

import pytest

from megatron_vl.plan.loss_chunk import LOGIT_BYTES, loss_chunk_tokens


@pytest.mark.parametrize(
    ("words", "tokens"), [(151936, 384), (151936 // 8, 3456), (512, 131072), (10**6, 128)]
)
def test_a_chunk_keeps_within_its_bytes(words, tokens):
    chunk = loss_chunk_tokens(words)
    assert chunk == tokens and chunk % 128 == 0
    assert chunk == 128 or 4 * words * chunk <= LOGIT_BYTES < 4 * words * (chunk + 128)


def test_a_configured_chunk_is_taken_as_it_is():
    assert [loss_chunk_tokens(151936, chunk) for chunk in (1, 1000, 10**6)] == [1, 1000, 10**6]
