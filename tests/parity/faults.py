"""Faults that tests plant on the ranks. The ranks outlive a test, so a fault is undone when its job ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch


class FaultyWorld:
    """A world whose ranks run every function with a fault in place; stands in for `LocalWorld`."""

    def __init__(self, world: Any, fault: str) -> None:
        self.world, self.fault = world, fault

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        return self.world.run(size, with_fault, self.fault, function, *args)


def with_fault(fault: str, function: Callable[..., Any], *args: Any) -> Any:
    """On a rank: call `function` with the fault planted, either in the code or in the built parts."""
    if fault in CODE:
        with CODE[fault]():
            return function(*args)
    job, *rest = args
    return function(replace(job, plant=PARTS[fault]), *rest)


def no_tensor_parallel_sum() -> AbstractContextManager:
    """Placement data: the gradients of the tower's copies are not added up."""
    from megatron.core.distributed import finalize_model_grads

    def finish(parts, chunks, num_tokens, **_):
        finalize_model_grads(list(chunks), num_tokens, pg_collection=parts.runtime.groups.megatron)

    return patch("megatron_vl.train.step.finish_gradients", finish)


def no_sum_over_all_ranks() -> AbstractContextManager:
    """Placement all: the gradients of the tower's copies are not added up."""
    from megatron.core.distributed import finalize_model_grads

    def finish(parts, chunks, num_tokens, **_):
        finalize_model_grads(list(chunks), num_tokens, pg_collection=parts.runtime.groups.megatron)
        parts.tower.scale_gradients(1.0 / num_tokens)

    return patch("megatron_vl.train.step.finish_gradients", finish)


def no_row_parallel_reduce() -> AbstractContextManager:
    """The partial sums of row-parallel products are not added up."""
    return patch(
        "megatron.core.tensor_parallel.layers.reduce_from_tensor_model_parallel_region",
        lambda x, group=None: x,
    )


def no_sequence_parallel_reduce() -> AbstractContextManager:
    """Norms under sequence parallelism keep the gradient of their own tokens."""
    return patch(
        "megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads",
        lambda *args, **kwargs: None,
    )


def no_context_parallel_sum() -> AbstractContextManager:
    """The gradient of gathered keys and values is cut up, not reduced."""

    def cut(x, group):
        return x.chunk(group.size())[group.rank()].contiguous()

    return patch("megatron_vl.ops.context_attention.sum_and_scatter_rows", cut)


def no_ring_gradients() -> AbstractContextManager:
    """The gradient of keys and values does not leave the rank where it was found."""
    from megatron_vl.ops.context_attention import GRADIENTS
    from megatron_vl.parallel.sequence_exchange import Passing

    class Staying(Passing):
        def __init__(self, x, group, tag=0):
            super().__init__(x, group, tag)
            self.kept = x if tag == GRADIENTS else None

        def received(self):
            came = super().received()
            return came if self.kept is None else self.kept

    return patch("megatron_vl.ops.context_attention.Passing", Staying)


def one_document() -> AbstractContextManager:
    """Tokens see the documents before their own in the row."""
    from megatron_vl.model.attention import document_bounds

    return patch(
        "megatron_vl.model.attention.document_bounds",
        lambda params: (document_bounds(params)[0], document_bounds(params)[-1]),
    )


def mean_of_tokens() -> AbstractContextManager:
    """The loss function hands the mean of its micro-batch to the schedule."""
    from megatron_vl.train.step import token_losses

    def mean(losses, labels):
        total, count, report = token_losses(losses, labels)
        return total / count.clamp(min=1), count, report

    return patch("megatron_vl.train.step.token_losses", mean)


def mean_over_data_parallel() -> AbstractContextManager:
    """Gradients are averaged over the data-parallel ranks."""
    from megatron_vl.train.step import finish_gradients

    def finish(parts, chunks, num_tokens, **_):
        finish_gradients(parts, chunks, num_tokens)
        for chunk in chunks:
            chunk.scale_gradients(1.0 / parts.runtime.layout.dp)

    return patch("megatron_vl.train.step.finish_gradients", finish)


def unshifted_labels() -> AbstractContextManager:
    """A position is asked for its own token."""
    return patch("megatron_vl.data.batch.shift_labels", lambda labels: labels)


@contextmanager
def no_gradient_from_other_owners() -> Iterator[None]:
    """The gradient of an image feature comes back only from positions that its encoder holds itself."""
    from megatron_vl.parallel.feature_exchange import _Exchange

    right = _Exchange.backward

    def backward(ctx, grad):
        out, *rest = right(ctx, grad)
        counts, rank = ctx.plan.get_counts, ctx.group.rank()
        begin = sum(counts[:rank])
        kept = ctx.plan.returned[begin : begin + counts[rank]]
        only = out * 0
        only[kept] = out[kept]
        return only, *rest

    with patch.object(_Exchange, "backward", staticmethod(backward)):
        yield


def gradient_from_every_copy() -> AbstractContextManager:
    """Tensor-parallel copies of an owner each send the gradient of a feature, and it is added up."""
    from megatron_vl.parallel.feature_exchange import _Exchange

    right = _Exchange.backward

    def backward(ctx, grad):
        out, *rest = right(ctx, grad)
        return out * 2, *rest

    return patch.object(_Exchange, "backward", staticmethod(backward))


def features_of_the_neighbour() -> AbstractContextManager:
    """Each rank puts the features that it received into the wrong slots."""
    from megatron_vl.model.step3_vl import put_features

    def put(embeddings, features, rows, positions):
        return put_features(embeddings, features.roll(1, 0), rows, positions)

    return patch("megatron_vl.model.step3_vl.put_features", put)


CODE = {
    f.__name__: f
    for f in (
        no_tensor_parallel_sum, no_sum_over_all_ranks, no_row_parallel_reduce, no_sequence_parallel_reduce,
        no_context_parallel_sum,
        no_gradient_from_other_owners, gradient_from_every_copy, features_of_the_neighbour, no_ring_gradients,
        one_document, mean_of_tokens, mean_over_data_parallel, unshifted_labels,
    )
}  # fmt: skip


def _scale(parts: Any, name: str) -> None:
    """Multiply a parameter, by our global name, by 1.001 on whichever rank has it."""
    import torch

    from megatron_vl.checkpoint.hf_names import global_name

    for chunk, stage in zip(parts.chunks, parts.stages):
        for local, parameter in chunk.module.named_parameters():
            if global_name(local, stage.layers) == name:
                with torch.no_grad():
                    parameter.mul_(1.001)


def wrong_position_table(parts: Any) -> None:
    _scale(parts, "vision_model.positional_embedding")


def wrong_tower_block(parts: Any) -> None:
    _scale(parts, "vision_model.transformer.layers.1.mlp.linear_fc2.weight")


def wrong_projector(parts: Any) -> None:
    _scale(parts, "projector.linear.weight")


def wrong_decoder_layer(parts: Any) -> None:
    _scale(parts, "language_model.decoder.layers.2.self_attention.linear_proj.weight")


def wrong_head(parts: Any) -> None:
    _scale(parts, "language_model.output_layer.weight")


PARTS = {
    f.__name__: f
    for f in (wrong_position_table, wrong_tower_block, wrong_projector, wrong_decoder_layer, wrong_head)
}
