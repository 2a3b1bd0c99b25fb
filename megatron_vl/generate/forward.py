"""One pass of a batch through the stages of a replica, with keys and values kept: prompts, then token by token.

Megatron-Core's own inference engines need CUDA and take no image. Here its decoder is called directly, with rotary
angles for each row's own position, so that rows of different lengths share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_vl.model.fusion import image_slots, put_features
from megatron_vl.model.kv_cache import KVCache, attention_slots
from megatron_vl.train.build import Parts


class Forward:
    """The forward pass of this rank's chunks. Every rank of the replica calls ``logits`` alike."""

    def __init__(self, parts: Parts) -> None:
        """Raises ConfigError when the layers are not those of the torch backend."""
        self.parts, self.groups = parts, parts.runtime.groups
        self.chunks = [chunk.module for chunk in parts.pipeline]
        self.slots = [slot for chunk in self.chunks for slot in attention_slots(chunk.decoder)]
        self.is_last = parts.runtime.is_last_stage
        self.cache: KVCache | None = None
        self.angles: torch.Tensor | None = None

    @contextmanager
    def batch(self, rows: int, length: int) -> Iterator[KVCache]:
        """Room for ``rows`` rows of up to ``length`` tokens; the memory is given back at the end."""
        self.cache = KVCache(len(self.slots), rows, length)
        self.angles = self.chunks[0].language_model.rotary_pos_emb.get_emb(length)
        for number, slot in enumerate(self.slots):
            slot.cache = (self.cache, number)
        try:
            yield self.cache
        finally:
            for slot in self.slots:
                slot.cache = None
            self.cache = self.angles = None

    @torch.no_grad()
    def prompts(
        self, ids: torch.Tensor, lengths: torch.Tensor, features: torch.Tensor | None, names: list[str]
    ) -> torch.Tensor | None:
        """The first pass. ids: int64 ``[b, s]``, padded on the right; lengths: true ones, int64 ``[b]``; features:
        of all images in stream order ``[rows, h]``, None without images and behind the first stage.

        Returns fp32 logits ``[b, vocabulary]`` behind each row's last token; None but on the last stage.
        """
        self.cache.at(None, 0)
        return self._pass(ids, self.angles[: ids.shape[1]], lengths - 1, features, names)

    @torch.no_grad()
    def tokens(self, ids: torch.Tensor, positions: torch.Tensor, reach: int) -> torch.Tensor | None:
        """One more token per row. ids, positions: int64 ``[b]``; reach: largest position + 1. Returns as `prompts`."""
        self.cache.at(positions, reach)
        return self._pass(ids[:, None], self.angles[positions].permute(1, 0, 2, 3), None, None, [])

    def _pass(self, ids, angles, last, features, names) -> torch.Tensor | None:
        pp, me = self.groups.pp.size(), self.groups.pp.rank()
        shape = (ids.shape[1], ids.shape[0], self.parts.decoder_config.hidden_size)
        end = pp * len(self.chunks) - 1
        for number in range(me, end + 1, pp):
            chunk = self.chunks[number // pp]
            hidden = (
                self._embed(chunk, ids, features, names) if number == 0 else self._receive(number - 1, shape)
            )
            chunk.language_model.decoder.set_input_tensor(None if number == 0 else hidden)
            hidden = chunk.language_model.decoder(
                hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles
            ).detach()
            chunk.language_model.decoder.set_input_tensor(None)
            if number < end:
                self._send(number + 1, hidden)
        return self._logits(chunk, hidden, last) if self.is_last else None

    def _embed(self, chunk, ids, features, names) -> torch.Tensor:
        """``[b, s] -> [s, b, h]``: as ``Step3VL`` embeds, whole rows on every rank."""
        embeddings = chunk.language_model.embedding(input_ids=ids, position_ids=None)
        if features is None:
            return embeddings
        slots = image_slots(ids, chunk.model.tokens.im_patch, features.shape[0], names)
        return put_features(embeddings, features, *slots)

    def _receive(self, number: int, shape: tuple[int, int, int]) -> torch.Tensor:
        """The output of chunk ``number`` of the pipeline."""
        hidden = torch.empty(shape, dtype=self.parts.dtype, device=self.parts.runtime.device)
        dist.recv(hidden, src=self._rank_of(number), group=self.groups.pp)
        return hidden

    def _send(self, number: int, hidden: torch.Tensor) -> None:
        """To the rank of chunk ``number``. Chunks run one after the other, so a send always meets its receive."""
        dist.send(hidden.contiguous(), dst=self._rank_of(number), group=self.groups.pp)

    def _rank_of(self, number: int) -> int:
        return dist.get_global_rank(self.groups.pp, number % self.groups.pp.size())

    def _logits(self, chunk, hidden: torch.Tensor, last: torch.Tensor | None) -> torch.Tensor:
        """``[s, b, h] -> [b, vocabulary]`` fp32 at each row's position ``last`` (None: the only one), on every rank of
        the tensor-parallel group.
        """
        rows = torch.arange(hidden.shape[1], device=hidden.device)
        picked = hidden[0 if last is None else last, rows][None]
        mine = chunk.language_model.output_layer(picked)[0][0].float().contiguous()
        tp = self.groups.tp
        if tp.size() > 1:
            out = mine.new_empty((tp.size() * mine.shape[0], mine.shape[1]))
            dist.all_gather_into_tensor(out, mine, group=tp)
            mine = out.view(tp.size(), *mine.shape).permute(1, 0, 2).flatten(1)
        return mine[:, : chunk.model.text.vocab_size]


@contextmanager
def sampling_mode(parts: Parts) -> Iterator[None]:
    """Evaluation mode and no sequence parallelism (one token is not divided over ranks); afterwards all is as before.

    ``set_model_to_sequence_parallel`` of Megatron-Core 0.16.1 is not used: switched back on, it also scatters the
    embedding, which is ours to do, and it keeps every model alive that it has seen.
    """
    modules = [module for chunk in parts.chunks for module in chunk.modules()]
    holders = {id(x): x for m in modules for x in (m, getattr(m, "config", None))}.values()
    names = ("sequence_parallel", "reduce_scatter_embeddings")
    switched = [(x, name) for x in holders for name in names if getattr(x, name, False) is True]
    training = [module for module in modules if module.training]
    try:
        for chunk in parts.chunks:
            chunk.eval()
        for holder, name in switched:
            setattr(holder, name, False)
        yield
    finally:
        for holder, name in switched:
            setattr(holder, name, True)
        for module in training:
            module.training = True
