"""Core attention of the ``torch`` backend over ``scaled_dot_product_attention``.

Fills Megatron-Core's ``core_attention`` slot, where the stock class can do neither context parallelism nor
packed rows. ``SelfAttention`` squeezes packed rows to ``thd`` and applies the rotary embedding; this module
exchanges K and V over the context-parallel group and runs one attention per document and local chunk, so the
work of a rank is what the plan says. Masks are needed only under context parallelism, one chunk of queries wide.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.parallel.context_parallel import gather_sequence

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
        assert cp_comm_type in (None, "all_gather"), "this backend exchanges K and V by all-gather"
        self.layer_number = layer_number
        self.causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp
        self.cache: tuple[KVCache, int] | None = (
            None  # while tokens are sampled: the cache, this layer's number
        )

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
        packed = packed_seq_params is not None
        if packed:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        cp = self.cp_group.size()
        bounds = document_bounds(packed_seq_params) if packed else (0, query.shape[0] * cp)
        if cp > 1:
            both = gather_sequence(torch.cat([key, value], dim=-1), bounds, self.cp_group)
            key, value = both.split(key.shape[-1], dim=-1)
        parts = [
            self._attend(query[q0:q1], key[k0:k1], value[k0:k1], diagonal)
            for q0, q1, k0, k1, diagonal in segments(bounds, cp, self.cp_group.rank(), self.causal)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)
        return out.flatten(-2).squeeze(1) if packed else out.flatten(-2)

    def _attend(self, query, key, value, diagonal: int | None) -> torch.Tensor:
        """``[q, b, n, d]`` against ``[k, b, g, d]``; row i may look at keys up to i + diagonal (None: all)."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        assert diagonal is None or k.shape[2] == diagonal + q.shape[2]
        mask = None
        if (
            diagonal
        ):  # a chunk behind the first, under context parallelism: causal from the lower right corner
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(diagonal)
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=diagonal == 0,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3)


def document_bounds(params: PackedSeqParams) -> tuple[int, ...]:
    """Padded document boundaries ``(0, ..., S)`` of a packed row, kept on the host by ``packed_params``."""
    return params.bounds


def segments(
    bounds: tuple[int, ...], cp: int, rank: int, causal: bool
) -> list[tuple[int, int, int, int, int | None]]:
    """The attention calls of one context-parallel rank.

    bounds: padded document boundaries in the row. Returns ``(q0, q1, k0, k1, diagonal)``: local query rows,
    global key rows, and how far query row i may look (None: everywhere; 0: plain causal). Query row i of a
    chunk that starts c tokens into its document may look at keys 0 .. c + i: the diagonal is c.
    """
    calls, local = [], 0
    for start, end in zip(bounds, bounds[1:]):
        length = end - start
        if length == 0:
            continue
        pieces = (
            [(0, length)]
            if cp == 1
            else [(i * (length // (2 * cp)), length // (2 * cp)) for i in (rank, 2 * cp - 1 - rank)]
        )
        for offset, size in pieces:
            last = start + offset + size if causal else end
            calls.append((local, local + size, start, last, offset if causal else None))
            local += size
    return calls


def packed_params(
    bounds: list[int] | None, lengths: list[int], device: torch.device
) -> PackedSeqParams | None:
    """``PackedSeqParams`` of a packed row, None for a dense one.

    bounds: padded document boundaries ``[0, ..., S]``. lengths: true document lengths. ``max_seqlen`` is the
    longest padded document, never the row: Megatron-Core's rope would otherwise not restart per document.
    """
    if bounds is None:
        return None
    padded = [b - a for a, b in zip(bounds, bounds[1:])]
    assert len(padded) == len(lengths) and all(t <= p for t, p in zip(lengths, padded)), (lengths, padded)
    true = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    edges = torch.tensor(bounds, dtype=torch.int32, device=device)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=true, cu_seqlens_kv=true, cu_seqlens_q_padded=edges,
        cu_seqlens_kv_padded=edges, max_seqlen_q=max(padded), max_seqlen_kv=max(padded),
    )  # fmt: skip
    params.bounds = tuple(bounds)
    return params
