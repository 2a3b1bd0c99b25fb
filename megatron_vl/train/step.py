"""One optimizer step: forward and backward over the micro-batches, gradients finished, clipped, applied.

Everything that trains (pre-training, SFT, parity checks, benchmarks) runs this step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vl.data.batch import MicroBatch
from megatron_vl.model.fp8_linear import end_step
from megatron_vl.model.step3_vl import OwnFeatures, StageInputs
from megatron_vl.optim.build import set_learning_rate
from megatron_vl.parallel.context_parallel import take_local
from megatron_vl.train.build import Parts
from megatron_vl.train.views import Fed, StepViews, feed_pipeline

SUM_AT_ONCE = 64 << 20  # elements of one all-reduce: bounds the copy that it works on to 256 MiB


class Rows(Protocol):
    """Anything that stands for a micro-batch; the schedules need its shape ``[b, S]`` only."""

    @property
    def input_ids(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the ``tokens`` scored tokens of the global batch. grad_norm: before clipping.

    skipped: one of the two is not finite, and the weights are what they were; the same on every rank.
    """

    loss: float
    tokens: int
    grad_norm: float
    skipped: bool = False


def stage_inputs(batch: MicroBatch, device: torch.device, own: OwnFeatures | None = None) -> StageInputs:
    """Move a micro-batch to the device. own: see `StageInputs`."""
    return StageInputs(
        input_ids=batch.input_ids.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        bounds=batch.cu_seqlens,
        lengths=batch.doc_lengths,
        view_kinds=batch.view_kinds,
        crop_pixels=batch.crop_pixels.to(device, non_blocking=True),
        global_pixels=batch.global_pixels.to(device, non_blocking=True),
        sample_ids=batch.sample_ids,
        own=own,
    )


def token_losses(
    losses: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss contract of Megatron-Core's schedules: (sum, token count, report), never a mean.

    losses: fp32 ``[b, S / cp]``; labels: the same positions, -100 = not scored. The one division, by the count
    summed over micro-batches, DP and CP, is in ``finalize_model_grads``; a rank whose tokens are all masked
    contributes 0 / 0 nowhere. The report is fp64 (sum, count).
    """
    scored = labels != -100
    kept = torch.where(scored, losses, torch.zeros_like(losses))
    count = scored.sum()
    return kept.sum(), count.to(torch.int), torch.stack([kept.detach().double().sum(), count.double()])


def forward_step(parts: Parts, tick: Callable[[], None], batches: Iterator[Fed], model: torch.nn.Module):
    """Megatron-Core's forward step: one micro-batch through one chunk, and what to do with its output."""
    tick()
    fed = next(batches)
    inputs = stage_inputs(fed.batch, parts.runtime.device, fed.own)
    labels = take_local(inputs.labels, inputs.bounds, parts.runtime.groups.cp)
    return model(inputs), partial(token_losses, labels=labels)


def finish_gradients(
    parts: Parts, chunks: Sequence[torch.nn.Module], num_tokens: torch.Tensor | None
) -> None:
    """Megatron-Core's reductions, then the sums that it does not know of.

    In placement ``data`` each TP rank has encoded its own views with its own copy of the tower, so the copies'
    gradients are parts of one sum over TP (design/megatron_core.md 5.1). It is linear, so it may follow the
    division by the token count. In placement ``all`` the tower's are summed over all ranks. chunks: of the pipeline.
    """
    finalize_model_grads(list(chunks), num_tokens, pg_collection=parts.runtime.groups.megatron)
    if parts.tower is not None:
        parts.tower.finish_grad_sync()
        if num_tokens is not None and num_tokens > 0:  # by now of the whole batch
            parts.tower.scale_gradients(1.0 / num_tokens)
        return
    tp = parts.runtime.groups.tp
    if parts.config.parallel.vision_placement != "data" or tp.size() == 1:
        return
    for chunk in chunks:
        gradients = [p.main_grad for p in chunk.module.vision_parameters() if p.requires_grad]
        for piece in pieces(gradients, SUM_AT_ONCE):
            flat = torch._utils._flatten_dense_tensors(piece)
            dist.all_reduce(flat, group=tp)
            for gradient, summed in zip(piece, torch._utils._unflatten_dense_tensors(flat, piece)):
                gradient.copy_(summed)


def pieces(tensors: Sequence[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    """The tensors in order, in groups of at most ``limit`` elements (one larger tensor is a group of its own)."""
    group: list[torch.Tensor] = []
    for tensor in tensors:
        if group and sum(t.numel() for t in group) + tensor.numel() > limit:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def no_tick() -> None:
    """For callers that nobody watches."""


def forward_backward(
    parts: Parts,
    batches: Sequence[MicroBatch],
    forward_only: bool = False,
    tick: Callable[[], None] = no_tick,
) -> tuple[float, int]:
    """Run all micro-batches of this data-parallel rank; gradients are summed, finished and divided.

    tick: called before each forward pass, as a sign of progress. Returns (loss, tokens) of the global batch, equal on
    every rank: mean loss over all scored tokens.
    """
    step = partial(forward_step, parts, tick)
    fed, views = feed_pipeline(parts, batches, not forward_only, tick)
    if forward_only:
        return global_loss(parts, run_schedule(parts, step, fed))
    return global_loss(parts, accumulate_gradients(parts, step, fed, views, tick))


def accumulate_gradients(
    parts: Parts,
    step: Callable,
    batches: Sequence[Rows],
    views: StepViews | None = None,
    tick: Callable[[], None] = no_tick,
) -> list[torch.Tensor]:
    """As ``run_schedule`` with backward passes: gradients are summed over micro-batches and ranks and divided once.

    views: what was encoded before the pipeline; its backward pass follows that of the pipeline.
    """

    def finish(chunks: Sequence[torch.nn.Module], num_tokens: torch.Tensor | None, **_: object) -> None:
        if views is not None:
            views.backward(tick)
        finish_gradients(parts, chunks, num_tokens)

    config = parts.decoder_config
    config.finalize_model_grads_func = finish
    waits = [chunk.no_sync for chunk in parts.pipeline]  # nothing is sent before the last micro-batch
    config.no_sync_func = waits if len(waits) > 1 else waits[0]
    try:
        return run_schedule(parts, step, batches, forward_only=False)
    finally:  # the config is part of every module: a reference from it would keep optimizer and groups alive
        config.finalize_model_grads_func = config.no_sync_func = None


def run_schedule(
    parts: Parts, step: Callable, batches: Sequence[Rows], forward_only: bool = True
) -> list[torch.Tensor]:
    """Megatron-Core's schedule of this layout over the micro-batches; what the loss functions report, in order.

    Only the last stage has reports.
    """
    micro_batch, seq_length = batches[0].input_ids.shape
    assert all(b.input_ids.shape == batches[0].input_ids.shape for b in batches), (
        "one row length, or stages hang"
    )
    chunks = parts.pipeline
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )


def global_loss(parts: Parts, reports: Sequence[torch.Tensor]) -> tuple[float, int]:
    """(mean loss, token count) over micro-batches, DP and CP, on every rank."""
    loss_sum, count = total_of_reports(parts, reports, 2).tolist()
    return loss_sum / max(count, 1.0), int(count)


def total_of_reports(
    parts: Parts, reports: Sequence[torch.Tensor], summed: int, maxima: int = 0
) -> torch.Tensor:
    """Reports over micro-batches, DP and CP, sent from the last stage to all: fp64 ``[summed + maxima]``.

    reports: fp64 of that size; the first ``summed`` entries are added up, of the others the largest counts.
    """
    groups = parts.runtime.groups
    total = torch.zeros(summed + maxima, dtype=torch.float64, device=parts.runtime.device)
    total[summed:] = -torch.inf
    sums, largest = total[:summed], total[summed:]
    for report in reports:
        sums += report[:summed]
        torch.maximum(largest, report[summed:], out=largest)
    if parts.runtime.is_last_stage:
        dist.all_reduce(sums, group=groups.dp_cp)
        if maxima:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.dp_cp)
    send_from_last_stage(parts, total)
    return total


def send_from_last_stage(parts: Parts, values: torch.Tensor) -> None:
    """Make ``values`` on every stage what they are on the last one."""
    group = parts.runtime.groups.pp
    dist.broadcast(values, src=dist.get_global_rank(group, group.size() - 1), group=group)


def train_step(
    parts: Parts, batches: Sequence[MicroBatch], lr: float, tick: Callable[[], None] = no_tick
) -> StepResult:
    """One optimizer step over the micro-batches of this data-parallel rank.

    When the loss or the gradient norm is not finite, on any rank, no rank changes weights, moments or step counts.
    """
    begin_step(parts)
    loss, tokens = forward_backward(parts, batches, tick=tick)
    set_learning_rate(parts.optimizer, lr, parts.config.optim.weight_decay)
    loss, norm, skipped = update(parts, loss)
    return StepResult(loss, tokens, norm, skipped)


def begin_step(parts: Parts) -> None:
    """Training mode, and gradients of zero."""
    for chunk in parts.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()


@torch.no_grad()
def update(parts: Parts, loss: float) -> tuple[float, float, bool]:
    """``MegatronOptimizer.step()`` of Megatron-Core 0.16.1 with a look before the leap: (loss, gradient norm, skipped).

    The weights become equal to those of ``step()`` bit by bit. A value that is not finite on another rank is nan. With
    ``overlap_param_gather`` they are still coming in: who reads them outside of a forward pass waits for them first
    (``ChunkDataParallel.wait_for_weights``).
    """
    optimizer = parts.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    norm = norm if uncounted_are_finite(optimizer) else math.nan
    bad = torch.tensor([not math.isfinite(loss), not math.isfinite(norm)], dtype=torch.int32)
    bad = bad.to(parts.runtime.device)
    dist.all_reduce(
        bad, op=dist.ReduceOp.MAX
    )  # a replica's norm may be its own: without the distributed optimizer
    bad_loss, bad_norm = bad.tolist()
    if bad_loss or bad_norm:
        end_step(parts.chunks, parts.runtime.groups, skipped=True)
        loss = math.nan if bad_loss and math.isfinite(loss) else loss
        return loss, math.nan if bad_norm and math.isfinite(norm) else norm, True
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()  # none on a stage whose weights are all frozen
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    end_step(parts.chunks, parts.runtime.groups, skipped=False)
    for chunk in parts.chunks:
        chunk.ask_for_weights()
    return loss, norm, False


def uncounted_are_finite(optimizer: MegatronOptimizer) -> bool:
    """Whether the gradients are finite that the norm leaves out: copies that another tensor-parallel rank counts."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        counted = {id(grad) for grad in part.get_main_grads_for_grad_norm()}
        grads = [p.grad for p in part.get_parameters() if p.grad is not None and id(p.grad) not in counted]
        if grads and not torch.stack(torch._foreach_norm(grads)).isfinite().all():
            return False
    return True


@torch.no_grad()
def evaluate_loss(
    parts: Parts, batches: Sequence[MicroBatch], tick: Callable[[], None] = no_tick
) -> tuple[float, int]:
    """(mean loss, tokens) of the global batch without gradients."""
    for chunk in parts.chunks:
        chunk.eval()
    return forward_backward(parts, batches, forward_only=True, tick=tick)
