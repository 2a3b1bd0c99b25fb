"""Extended rotary frequencies inside Megatron-Core's own rotary embedding.

Its ``yarn`` variant has equal numbers, but reads them from attributes that ``TransformerConfig`` does not declare, and
multiplies queries and keys by a factor that fused kernels do not know. Here the plain embedding gets other frequencies,
and the factor goes into the softmax (``plan.rope.attention_scale``).
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_vl.config.rope import RopeScaling
from megatron_vl.plan.rope import rope_frequencies


def extend_rope(rotary: RotaryEmbedding, channels: int, rotary_base: float, scaling: RopeScaling) -> None:
    """Give a fresh embedding the frequencies of ``scaling``, fp32 ``[channels / 2]``. ``none`` changes nothing.

    Call it before the first forward pass: the embedding keeps the angles of lengths that it has seen.
    """
    if scaling.kind == "none":
        return
    frequencies = rope_frequencies(channels, rotary_base, scaling)
    assert rotary.inv_freq.shape == (len(frequencies),), "all channels of a head are rotated"
    rotary.inv_freq = torch.tensor(frequencies, dtype=torch.float32, device=rotary.inv_freq.device)
