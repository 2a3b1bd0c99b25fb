"""A short name for the values of weights: equal in every layout, another one after any update.

Each value is multiplied by an odd number that follows from its place in its released matrix, and all products are added
up modulo 2^64. A sum does not ask how the matrices were cut, and since the factors are odd, no change of one value
leaves it as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
import torch.distributed as dist

from megatron_vl.checkpoint.hf_names import DECODER, PROJECTOR, VISION
from megatron_vl.checkpoint.live import Live
from megatron_vl.generate.noise import GOLDEN, MASK, mix, signed
from megatron_vl.train.build import Parts

AT_ONCE = 1 << 22  # values; bounds the int64 copies to some 100 MB
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_version(parts: Parts) -> str:
    """16 hexadecimal digits over all weights, whatever is frozen; every rank calls it and gets the same."""
    return digest_of(parts, {DECODER, VISION, PROJECTOR})


def vision_version(parts: Parts) -> str:
    """The same over tower and projector: what image features depend on."""
    return digest_of(parts, {VISION, PROJECTOR})


@torch.no_grad()
def digest_of(parts: Parts, which: Collection[str]) -> str:
    """16 hexadecimal digits over the weights of these parts. Each rank adds up what it would write to a checkpoint."""
    config = parts.config
    live = Live(
        config.model, config.parallel.vision_placement, parts.runtime, parts.stages, parts.chunks, None
    )
    total = 0
    for slot in live.weights():
        if not slot.writes or slot.rule.part not in which:
            continue
        for part in slot.fragments(config.model):
            total += rectangle_sum(part.name, part.gather(slot.values), part.offset, part.shape[1])
    totals = [0] * parts.runtime.layout.world_size
    dist.all_gather_object(totals, total & MASK)
    text = f"{sum(totals) & MASK:016x} {parts.dtype} {sorted(which)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rectangle_sum(name: str, values: torch.Tensor, offset: tuple[int, int], columns: int) -> int:
    """The part of a matrix's sum, modulo 2^64, that a rectangle ``[r, c]`` of it brings.

    offset: (row, column) of its first value. columns: of the whole matrix.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    rows_at_once = max(1, AT_ONCE // max(values.shape[1], 1))
    across = torch.arange(values.shape[1], device=values.device) + offset[1]
    total = 0
    for first in range(0, values.shape[0], rows_at_once):
        piece = values[first : first + rows_at_once].contiguous()
        bits = piece.view(BITS[piece.element_size()]).to(torch.int64)
        down = torch.arange(len(piece), device=values.device) + offset[0] + first
        place = down[:, None] * columns + across
        total += int((bits * (mix(place * signed(GOLDEN) + signed(key)) | 1)).sum())
    return total & MASK
