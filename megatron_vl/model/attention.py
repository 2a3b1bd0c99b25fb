"""Core attention of the ``torch`` backend.

Fills Megatron-Core's ``core_attention`` slot, where the stock class can do neither context parallelism nor
packed rows. ``SelfAttention`` squeezes packed rows to ``thd`` and applies the rotary embedding;
ops/context_attention.py exchanges K and V and attends within each document. There are no masks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.ops.context_attention import attention

if TYPE_CHECKING:
    from megatron_vl.model.kv_cache import KVCache


class TorchCoreAttention(torch.nn.Module):
    """Softmax attention, causal or full, grouped queries, dense (``sbhd``) or packed (``thd``) rows.

    Shapes (``cp`` = context-parallel size, ``n`` / ``g`` query / key-value heads of this tensor-parallel rank):
    dense: query ``[S / cp, b, n, d]``, key and value ``[S / cp, b, g, d]`` -> ``[S / cp, b, n * d]``;
    packed: query ``[S / cp, n, d]``, key and value ``[S / cp, g, d]`` -> ``[S / cp, n * d]``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
        assert not (attention_dropout or config.attention_dropout), "STEP3-VL has no attention dropout"
        assert cp_comm_type in (None, "p2p", "all_gather"), "choose_backend refuses the others"
        self.layer_number = layer_number
        self.causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group, self.exchange = pg_collection.cp, cp_comm_type or "p2p"
        # while tokens are sampled: the cache, and this layer's number
        self.cache: tuple[KVCache, int] | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        assert attention_mask is None and attention_bias is None, "masks follow from the documents of the row"
        if self.cache is not None:
            cache, layer = self.cache
            return cache.attend(layer, query, key, value, self.scale)
        if packed_seq_params is not None:
            return self._attend(query, key, value, document_bounds(packed_seq_params)).flatten(-2)
        length, rows = query.shape[:2]  # dense rows are documents of equal length
        bounds = tuple(row * length * self.cp_group.size() for row in range(rows + 1))
        out = self._attend(*(x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)), bounds)
        return out.flatten(-2).unflatten(0, (rows, length)).transpose(0, 1).contiguous()

    def _attend(self, query, key, value, bounds: tuple[int, ...]) -> torch.Tensor:
        return attention(query, key, value, bounds, self.scale, self.causal, self.cp_group, self.exchange)


def document_bounds(params: PackedSeqParams) -> tuple[int, ...]:
    """Padded document boundaries ``(0, ..., S)`` of a packed row, kept on the host by ``packed_params``."""
    return params.bounds


def packed_params(
    bounds: list[int] | None, lengths: list[int], device: torch.device
) -> PackedSeqParams | None:
    """``PackedSeqParams`` of a packed row, None for a dense one.

    bounds: padded document boundaries ``[0, ..., S]``. lengths: true document lengths. ``max_seqlen`` is the
    longest padded document, never the row: Megatron-Core's rope would otherwise not restart per document.
    Padding counts as part of its document everywhere: it stands behind the text, which does not see it. (Transformer
    Engine cuts true lengths by rounding down under context parallelism, and flash-attn takes no gaps.)
    """
    if bounds is None:
        return None
    padded = [b - a for a, b in zip(bounds, bounds[1:])]
    assert len(padded) == len(lengths) and all(t <= p for t, p in zip(lengths, padded)), (lengths, padded)
    edges = torch.tensor(bounds, dtype=torch.int32, device=device)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, cu_seqlens_q_padded=edges,
        cu_seqlens_kv_padded=edges, max_seqlen_q=max(padded), max_seqlen_kv=max(padded),
    )  # fmt: skip
    params.bounds = tuple(bounds)
    return params
