"""Which attention can do what: rules between layer backend, exchange of K and V, and packed rows."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vl.config.mixture import PackingConfig
from megatron_vl.config.model import TextConfig
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import Problem

COMM, FLASH = "parallel.cp_comm_type", "parallel.flash_attention"


def check_attention(text: TextConfig, parallel: ParallelConfig, packing: PackingConfig) -> Iterator[Problem]:
    """``layer_backend: auto`` is decided when the model is built; what it cannot do is refused there."""
    if parallel.context_parallel_size > 1:
        yield from _exchange(text, parallel, packing)
    if parallel.flash_attention == "built_in":
        return
    if parallel.device == "cpu":
        yield Problem(
            FLASH, parallel.flash_attention, "needs a CUDA device, but parallel.device = cpu", "remove it"
        )
    elif parallel.layer_backend == "transformer_engine":
        rule = "is for the torch layers; Transformer Engine chooses its kernels itself"
        yield Problem(FLASH, parallel.flash_attention, rule, "remove it or set parallel.layer_backend torch")


def _exchange(text: TextConfig, parallel: ParallelConfig, packing: PackingConfig) -> Iterator[Problem]:
    chosen, cp = parallel.cp_comm_type, parallel.context_parallel_size
    if chosen == "a2a" and (parallel.layer_backend == "torch" or parallel.device == "cpu"):
        rule = "the torch layers exchange K and V by p2p or all_gather"
        yield Problem(COMM, chosen, rule, "use one of the two, or parallel.layer_backend transformer_engine")
    if chosen == "a2a":
        groups = max(text.num_query_groups // parallel.tensor_model_parallel_size, 1)
        if groups % cp:
            yield Problem(
                COMM,
                chosen,
                f"shares heads out over context_parallel_size {cp}, which must divide the {groups} key-value heads "
                "of a tensor-parallel rank",
                "use p2p, or smaller sizes",
            )
    if chosen != "p2p" and parallel.layer_backend == "transformer_engine" and packing.enabled:
        yield Problem(
            COMM,
            chosen,
            "Transformer Engine 2.11 takes packed rows (thd) with p2p only",
            "use p2p, or parallel.layer_backend torch with all_gather",
        )
