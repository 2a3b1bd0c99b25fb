"""What the ranks do for the tests of communication beside computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_vl.checkpoint.hf_names import global_name
from megatron_vl.config.schema import RunConfig
from megatron_vl.parity.on_rank import Seen, gather_gradients
from megatron_vl.parity.reference import Batches, micro_batches
from megatron_vl.train.build import Parts
from megatron_vl.train.prepare import live_parts
from megatron_vl.train.step import begin_step, forward_backward, train_step, update
from tests.model.on_ranks import build_parts


@dataclass
class Passes:
    """What a rank has seen. sent: (chunk, bucket group) in the order in which they were sent, in the last pass;
    early: how many of them before the backward pass had ended."""

    seen: Seen
    sent: list[tuple[int, int]] = field(default_factory=list)
    early: int = 0
    groups: int = 0


def passes_on_rank(config: RunConfig, passes: Sequence[Batches]) -> Passes:
    """Forward and backward passes over other rows each time; gradients of the last one."""
    parts = build_parts(config)
    sent: list[tuple[int, int]] = []
    ended: list[int] = []
    plain = _ParamAndGradBucketGroup.start_grad_sync
    number = {
        id(g): (c, i) for c, chunk in enumerate(parts.chunks) for i, g in enumerate(chunk.bucket_groups)
    }

    def start(self, force_all_reduce=False):
        if self.grad_reduce_handle is None:
            sent.append(number[id(self)])
        return plain(self, force_all_reduce)

    def finish(chunk, force_all_reduce=False):
        ended.append(len(sent))
        return type(chunk).finish_grad_sync(chunk, force_all_reduce)

    with patch.object(_ParamAndGradBucketGroup, "start_grad_sync", start):
        for chunk in parts.chunks:
            chunk.finish_grad_sync = lambda force_all_reduce=False, chunk=chunk: finish(
                chunk, force_all_reduce
            )
        for batches in passes:
            sent.clear(), ended.clear()
            feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
            for chunk in parts.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            loss, tokens = forward_backward(parts, feed)
    seen = Seen(parts.runtime.rank, losses=[loss], tokens=tokens)
    for chunk, stage in zip(parts.chunks, parts.stages):
        gather_gradients(chunk)
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                seen.gradients[global_name(name, stage.layers)] = parameter.main_grad.detach().clone()
    return Passes(seen, sent, ended[0], sum(len(chunk.bucket_groups) for chunk in parts.chunks))


class Arrival:
    """Weights that are not there before somebody waits for them: a stand-in for a gather in flight."""

    def __init__(self, group: _ParamAndGradBucketGroup) -> None:
        self.coming = [(bucket.param_data, bucket.param_data.clone()) for bucket in group.buckets]
        for bucket in group.buckets:
            bucket.param_data.fill_(math.nan)

    def wait(self) -> None:
        for where, values in self.coming:
            where.copy_(values)


@contextmanager
def weights_that_arrive_late():
    """Every gather is done at once, and its result hidden until it is waited for."""
    plain = _ParamAndGradBucketGroup.start_param_sync

    @torch.no_grad()
    def start(self, force_sync=False):
        assert not force_sync and self.param_gather_handle is None
        plain(self, force_sync=True)
        self.param_gather_handle = Arrival(self)

    with patch.object(_ParamAndGradBucketGroup, "start_param_sync", start):
        yield


@dataclass
class Trained:
    """(loss, norm, skipped) by step, and the weights as a checkpoint sees them."""

    steps: list[tuple[float, float, bool]]
    weights: dict[str, torch.Tensor]


def trained_on_rank(
    config: RunConfig, rows: Sequence[Batches], late: bool, unhooked: bool = False
) -> Trained:
    """A step for each of ``rows``, with a step that is not finite behind the first.

    late: weights arrive when they are waited for. unhooked: nobody waits for the head's, and no step is skipped, whose
    end would.
    """
    parts = build_parts(config, with_optimizer=True)
    steps = []
    with ExitStack() as stack:
        if late:
            stack.enter_context(weights_that_arrive_late())
        if unhooked:
            for chunk in parts.chunks:
                chunk.module.decoder._forward_hooks.clear()
        for number, batches in enumerate(rows):
            feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
            if number == 1 and not unhooked:
                begin_step(parts)
                forward_backward(parts, feed)
                assert update(parts, math.nan)[2]
            result = train_step(parts, feed, 1e-3)
            steps.append((result.loss, result.grad_norm, result.skipped))
        names = [name for chunk in parts.chunks for name, _ in chunk.named_parameters()]
        slots = live_parts(parts).weights()
        keys = [f"{i} {name}" for i, name in enumerate(names)]
        return Trained(steps, {key: s.values.clone() for key, s in zip(keys, slots, strict=True)})


def planted(config: RunConfig, passes: Sequence[Batches]) -> str:
    """What Megatron-Core says when the tower's buckets are sent like the decoder's."""
    parts: Parts = build_parts(config)
    for chunk in parts.chunks:
        chunk.late_groups = []
    for batches in passes:
        feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
        for chunk in parts.chunks:
            chunk.zero_grad_buffer()
        try:
            forward_backward(parts, feed)
        except AssertionError as error:
            return str(error)
    return "nothing"
