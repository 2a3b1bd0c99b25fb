"""How a row of tokens is cut for context parallelism, and which row lengths that allows."""

from __future__ import annotations

from collections.abc import Sequence


def row_multiple(tensor_parallel: int, context_parallel: int, sequence_parallel: bool) -> int:
    """What every row (and, packed, every padded document) must be a multiple of.

    Context parallelism cuts each document into 2 x CP chunks; sequence parallelism cuts the rest over TP.
    """
    chunks = 2 * context_parallel if context_parallel > 1 else 1
    return chunks * (tensor_parallel if sequence_parallel else 1)


def zigzag(cu_seqlens: Sequence[int], context_parallel: int) -> list[list[int]]:
    """Token indices that each context-parallel rank holds, in the order in which it holds them.

    cu_seqlens: padded document boundaries, `[0, ..., S]`; a dense row is `[0, S]`. Every document is cut into
    2 x CP equal chunks and rank r takes chunks r and 2 x CP - 1 - r, which gives all ranks the same share of
    causal attention. Documents keep their order. With one rank the order is unchanged and no length rule
    applies. Raises ValueError when a document does not divide.
    """
    if context_parallel == 1:
        return [list(range(cu_seqlens[0], cu_seqlens[-1]))]
    pieces = 2 * context_parallel
    held: list[list[int]] = [[] for _ in range(context_parallel)]
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        length, rest = divmod(end - start, pieces)
        if rest:
            raise ValueError(
                f"document of {end - start} tokens: with context parallelism {context_parallel} its "
                f"padded length must "
                f"be a multiple of {pieces}; pad it to {(length + 1) * pieces}"
            )
        for rank in range(context_parallel):
            for chunk in (rank, pieces - 1 - rank):
                held[rank].extend(range(start + chunk * length, start + (chunk + 1) * length))
    return held
