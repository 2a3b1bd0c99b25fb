"""How many tokens' logits the loss holds at once."""

from __future__ import annotations

LOGIT_BYTES = 256 << 20  # of the fp32 logits of one chunk on one rank
STEP = 128  # rows of a matrix product that run without waste


def loss_chunk_tokens(vocab_per_rank: int, configured: int | None = None) -> int:
    """Tokens of one chunk of `ops.cross_entropy`.

    vocab_per_rank: rows of the head on one tensor-parallel rank. configured: `train.loss_chunk_tokens`, which is
    taken as it is; None = as many tokens as keep the chunk's fp32 logits within 256 MiB, in steps of 128, and at
    least 128: with fewer, adding each chunk's weight gradient to the sum costs more than computing it.
    """
    if configured is not None:
        return configured
    return max(STEP, LOGIT_BYTES // (4 * vocab_per_rank) // STEP * STEP)
