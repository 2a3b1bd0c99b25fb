"""Which reductions of gradients and gatherings of weights run beside computation, and in buckets of what size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import Problem

BUCKET = 40_000_000  # elements, and at least this many per rank that shares the sum: Megatron-Core's defaults
BUCKET_PER_COPY = 1_000_000


@dataclass(frozen=True)
class Overlap:
    """grad_reduce: sums over DP x CP run beside the backward pass. param_gather: updated weights come in beside the
    forward pass of the next step."""

    grad_reduce: bool
    param_gather: bool


NONE = Overlap(False, False)


def overlap_of(parallel: ParallelConfig, copies: int, on_cpu: bool) -> Overlap:
    """What is done, where nothing is said: both on a GPU, if there is anything to communicate. copies: DP x CP."""
    worth = copies > 1 and not on_cpu
    reduce, gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    reduce = worth if reduce is None else reduce
    if gather is None:
        gather = worth and reduce and parallel.use_distributed_optimizer
    return Overlap(reduce, gather)


def bucket_elements(parallel: ParallelConfig, copies: int, on_cpu: bool) -> int | None:
    """Elements after which a bucket of gradients is closed; None: all of a chunk is one.

    On the first pipeline rank, in its first chunk: elsewhere the sums are not on the critical path (Megatron-Core).
    """
    if not overlap_of(parallel, copies, on_cpu).grad_reduce:
        return None
    return parallel.ddp_bucket_size or max(BUCKET, BUCKET_PER_COPY * copies)


def check_overlap(parallel: ParallelConfig) -> Iterator[Problem]:
    """Keys that contradict each other."""
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield Problem(
            "parallel.overlap_param_gather",
            True,
            "gathers what parallel.use_distributed_optimizer has sharded, but that is false",
            "set use_distributed_optimizer true, or leave this key out",
        )
    if parallel.overlap_param_gather and parallel.overlap_grad_reduce is False:
        yield Problem(
            "parallel.overlap_param_gather",
            True,
            "works in the buckets of parallel.overlap_grad_reduce, which is false",
            "leave one of the two out",
        )
