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
from megatron_vl.ops.cross_entropy import Scoring, TokenScores
from megatron_vl.parallel.context_parallel import take_local
from megatron_vl.train.build import Parts
from megatron_vl.train.feed import Feed
from megatron_vl.train.step import no_tick, run_schedule, stage_inputs
from megatron_vl.train.views import feed_pipeline


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
    fed, _ = feed_pipeline(parts, batches, train=False, tick=no_tick)
    wrong = run_schedule(parts, partial(_forward, parts), fed, forward_only=True)
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


def _forward(parts: Parts, batches, model: torch.nn.Module):
    fed = next(batches)
    inputs = stage_inputs(fed.batch, parts.runtime.device, fed.own)
    assert inputs.bounds is None, "scoring takes dense rows: one sample each"
    labels = take_local(inputs.labels, None, parts.runtime.groups.cp)

    def misses(scores: TokenScores):
        wrong = (scores.best != labels) & (labels != -100)
        return scores.losses.sum(), (labels != -100).sum().to(torch.int), wrong.sum(dim=1)

    return model(inputs, Scoring(best=True)), misses
