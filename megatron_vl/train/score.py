"""Exact match of answers from one teacher-forced pass.

A sample is right when at every scored position the most probable token is the target. That equals greedy
decoding: as long as each token is right, decoding continues from the same prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_vl.data.batch import MicroBatch
from megatron_vl.parallel.context_parallel import take_local
from megatron_vl.train.build import Parts
from megatron_vl.train.feed import Feed
from megatron_vl.train.step import run_schedule, stage_inputs


def score(parts: Parts, feed: Feed) -> dict[str, bool]:
    """Whether each sample of the evaluation set is right, by sample id; equal on every rank.

    Every rank calls it. Filler rows and refused samples are left out.
    """
    for chunk in parts.chunks:
        chunk.eval()
    right: dict[str, bool] = {}
    feed.loader.seek(0)
    with torch.no_grad():
        for _ in range(feed.loader.num_steps):
            right.update(_score_step(parts, feed.next_step()))
    everyone: list[dict[str, bool]] = [{} for _ in range(parts.runtime.layout.world_size)]
    dist.all_gather_object(everyone, right)
    return {name: value for part in everyone for name, value in part.items()}


def _score_step(parts: Parts, batches: Sequence[MicroBatch]) -> dict[str, bool]:
    """One step's samples; empty on all but the last stage's first rank of each replica."""
    groups = parts.runtime.groups
    with _Predictions(parts) as predictions:
        wrong = run_schedule(parts, partial(_forward, parts, predictions), batches, forward_only=True)
    if not parts.runtime.is_last_stage:
        return {}
    counts = torch.stack(wrong)
    dist.all_reduce(counts, group=groups.cp)
    if groups.tp.rank() or groups.cp.rank():
        return {}
    found = {}
    for batch, misses in zip(batches, counts.tolist()):
        scored = (batch.labels != -100).any(dim=1).tolist()
        found.update({n: m == 0 for n, m, s in zip(batch.sample_ids, misses, scored, strict=True) if n and s})
    return found


def _forward(parts: Parts, predictions: _Predictions, batches, model: torch.nn.Module):
    inputs = stage_inputs(next(batches), parts.runtime.device)
    assert inputs.bounds is None, "scoring takes dense rows: one sample each"
    labels = take_local(inputs.labels, None, parts.runtime.groups.cp)

    def misses(losses: torch.Tensor):
        wrong = (predictions.newest() != labels) & (labels != -100)
        return losses.sum(), (labels != -100).sum().to(torch.int), wrong.sum(dim=1)

    return model(inputs), misses


class _Predictions:
    """Most probable token per position, taken from the head's output while the scope is open."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._value: torch.Tensor | None = None
        self._hook = None

    def newest(self) -> torch.Tensor:
        """int64 ``[b, S / cp]`` of the micro-batch that just left the head."""
        return self._value

    def __enter__(self) -> _Predictions:
        head = self.parts.chunks[-1].module.language_model
        if self.parts.stages[-1].has_head:
            self._hook = head.output_layer.register_forward_hook(self._take)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _take(self, module: torch.nn.Module, inputs, output) -> None:
        """Logits come as ``[S / cp, b, vocabulary / tp]``: the best of each shard, then the best of the shards."""
        logits, tp = output[0].float(), self.parts.runtime.groups.tp
        best, token = logits.max(dim=-1)
        token = token + tp.rank() * logits.shape[-1]
        pair = torch.stack([best.double(), token.double()])
        pairs = torch.empty((tp.size() * 2, *best.shape), dtype=pair.dtype, device=pair.device)
        dist.all_gather_into_tensor(pairs, pair, group=tp)
        pairs = pairs.view(tp.size(), *pair.shape)
        winner = pairs[:, 0].argmax(dim=0, keepdim=True)
        self._value = pairs[:, 1].gather(0, winner)[0].long().transpose(0, 1)
