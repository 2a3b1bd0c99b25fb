"""Keys and values of tokens that were seen, for the core attention of the ``torch`` backend."""

from __future__ import annotations

import torch

from megatron_vl.errors import ConfigError
from megatron_vl.model.attention import TorchCoreAttention


class KVCache:
    """Keys and values of a batch on one rank, ``[b, g, length, d]`` for each of the rank's layers.

    Rows stand at different positions: row r's keys are those of its tokens ``0 .. position[r]``, what lies behind is
    never looked at. Rows are whole on each rank: context parallelism is passed by.
    """

    def __init__(self, layers: int, rows: int, length: int) -> None:
        """Memory is taken with the first pass, when heads, dtype and device are known."""
        self.layers, self.rows, self.length = layers, rows, length
        self.keys: list[torch.Tensor | None] = [None] * layers
        self.values: list[torch.Tensor | None] = [None] * layers
        self.positions: torch.Tensor | None = None  # int64 [b]: where the next token of each row is written
        self.reach = 0  # one more than the largest of them, on the host
        self._seen: torch.Tensor | None = None

    def at(self, positions: torch.Tensor | None, reach: int) -> None:
        """Before a pass. None: the first one, whole prompts from position 0 on; else one token per row."""
        self.positions, self.reach, self._seen = positions, reach, None
        if positions is not None:
            keys = torch.arange(reach, device=positions.device)
            self._seen = (keys <= positions[:, None])[:, None, None, :]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query ``[s, b, n, d]``, key and value ``[s, b, g, d]``, all rotated -> ``[s, b, n * d]``.

        In the first pass rows are padded on the right: a causal mask keeps the padding out of every real token.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        first = self.positions is None
        self._keep(layer, k, v)
        if not first:
            k, v = self.keys[layer][:, :, : self.reach], self.values[layer][:, :, : self.reach]
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._seen,
            is_causal=first,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(-2)

    def _keep(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for kept, new in ((self.keys, k), (self.values, v)):
            if kept[layer] is None:
                kept[layer] = new.new_zeros((self.rows, new.shape[1], self.length, new.shape[3]))
            if self.positions is None:
                kept[layer][:, :, : new.shape[2]] = new
            else:
                rows = torch.arange(self.rows, device=new.device)
                kept[layer][rows, :, self.positions] = new[:, :, 0]

    def take(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may come several times. One layer is copied at a time."""
        self.rows = len(rows)
        for kept in (self.keys, self.values):
            for layer, tensor in enumerate(kept):
                kept[layer] = tensor.index_select(0, rows)


def attention_slots(decoder: torch.nn.Module) -> list[TorchCoreAttention]:
    """The core attention of each layer of a decoder chunk.

    Raises:
        ConfigError: it is another backend's, which cannot take the cache.
    """
    found = [layer.self_attention.core_attention for layer in decoder.layers]
    for slot in found:
        if not isinstance(slot, TorchCoreAttention):
            raise ConfigError(
                f"parallel.layer_backend: the local sampler keeps its KV cache in the attention of the torch backend, "
                f"this model has {type(slot).__name__}; set parallel.layer_backend=torch"
            )
    return found
