"""What a pipeline rank has in flight: micro-batches whose backward pass is still to come, by model chunk.

The order of Megatron-Core 0.16.1: plain 1F1B, or interleaved in groups of PP micro-batches.
"""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=4096)
def peaks_in_flight(pp: int, vpp: int, pp_rank: int, num_microbatches: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches in flight of each chunk of the rank, at every moment that can be the fullest.

    vpp > 1 needs `num_microbatches` to be a multiple of pp. No later moment of a long step is fuller than those of
    its first rounds, so that only those are looked at.
    """
    if vpp == 1:
        return ((min(pp - pp_rank, num_microbatches),),)
    total = min(num_microbatches, 4 * pp) * vpp
    warmup = min(2 * (pp - pp_rank - 1) + (vpp - 1) * pp, total)
    held, found = [0] * vpp, set()
    for step in range(total):
        held[chunk_of(step, pp, vpp)] += 1
        found.add(tuple(held))
        if step >= warmup:
            held[vpp - 1 - chunk_of(step - warmup, pp, vpp)] -= 1
    return tuple(one for one in found if not any(_covers(other, one) for other in found))


def chunk_of(step: int, pp: int, vpp: int) -> int:
    """Which chunk the `step`-th forward pass of a rank runs: each for pp micro-batches in turn."""
    return step % (pp * vpp) // pp


def _covers(other: tuple[int, ...], one: tuple[int, ...]) -> bool:
    return other != one and all(a >= b for a, b in zip(other, one))
