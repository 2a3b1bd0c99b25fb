"""What context-parallel ranks send each other for the attention of one decoder layer.

As `ops/context_attention.py` does it, and Transformer Engine 2.11, which hands gradients on in the format of K and V
and sums them at home with its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.plan.kernels import FP32, Kernels


@dataclass(frozen=True)
class Exchange:
    """Bytes that one rank sends.

    forward: K and V, in every forward pass, repeated ones too. backward: K and V again, and their gradients. home: the
    last way of gradients, behind all computation; with the ring of the torch layers only, else it is part of backward.
    """

    forward: float
    backward: float
    home: float = 0.0


def exchange_of(kernels: Kernels, ranks: int, whole: float) -> Exchange:
    """whole: bytes of K and V of a micro-batch on all of these ranks together, in `kernels.element`."""
    turn = (ranks - 1) / ranks * whole  # to all others but itself
    if not kernels.ring:  # gathered, gathered again, gradients summed and scattered
        return Exchange(turn, 2 * turn)
    if not kernels.joined_rows:
        return Exchange(turn, 2 * turn)
    wider = FP32 / kernels.element  # gradients are summed on their way, in fp32
    return Exchange(turn, turn + wider * turn, wider * whole / ranks)
