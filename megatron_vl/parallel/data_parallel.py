"""Megatron-Core's DDP with communication beside computation for a model part of which does not always run.

Stock DDP sends a bucket when each of its weights has reported a gradient, and gathers a weight when its module is
first called. On a rank whose micro-batch has no images the tower reports none and is not called; on one that
recomputes chunks of views it reports several times: ranks would wait for ever, mix buckets, or send half a sum. So that
every rank sends and gathers the same buckets in the same order:

* a bucket with a weight that may not run (``late``) is sent behind the backward pass of the last micro-batch; the
  others, which are filled in the same order everywhere, as in stock DDP;
* all updated weights are asked for at one time, behind the optimizer, in the order of the forward pass; a module's
  call only waits for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.plan.overlap import Overlap


class ChunkDataParallel(DistributedDataParallel):
    """A model chunk with fp32 gradients that are summed, never averaged, over DP x CP, or over what ``groups`` says.

    late: weights that may have no gradient in a micro-batch, or several. directly: (module, weight): the weight is
    read behind the module's forward pass without a call of its own module. within: such weights that are read in it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        chunk: torch.nn.Module,
        overlap: Overlap,
        bucket: int | None,
        distributed_optimizer: bool,
        one_bucket: bool,
        late: Iterable[torch.nn.Parameter] = (),
        directly: tuple[torch.nn.Module, torch.nn.Parameter] | None = None,
        within: Iterable[tuple[torch.nn.Module, torch.nn.Parameter]] = (),
        groups: ProcessGroupCollection | None = None,
    ) -> None:
        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=distributed_optimizer,
            average_in_collective=False,
            overlap_grad_reduce=overlap.grad_reduce,
            overlap_param_gather=overlap.param_gather,
            align_param_gather=overlap.param_gather,  # a module's call asks for no other bucket
            bucket_size=bucket,
        )
        super().__init__(config, options, chunk, disable_bucketing=one_bucket, pg_collection=groups)
        may_not_run = {id(parameter) for parameter in late}
        self.late_groups = [
            group for group in self.bucket_groups if any(id(p) in may_not_run for p in group.params)
        ]
        self._has_weights()
        if overlap.param_gather and directly is not None and directly[1] in self.param_to_bucket_group:
            directly[0].register_forward_hook(self._waits_for(directly[1]))
        for module, weight in within if overlap.param_gather else ():
            if weight in self.param_to_bucket_group:  # frozen weights are in none
                module.register_forward_pre_hook(self._waits_for(weight))

    def _waits_for(self, weight: torch.nn.Parameter) -> Callable[..., None]:
        group = self.param_to_bucket_group[weight]
        return lambda *_: group.finish_param_sync(True)

    def _make_backward_post_hook(self, param: torch.nn.Parameter):
        """Behind a weight's gradient: add it up in fp32, and say that it is there.

        Without gradient something else has added it up (the head's, chunk by chunk: ops/cross_entropy.py).
        """

        def hook(*_: object) -> None:
            if param.grad is not None:
                param.main_grad.add_(param.grad.data)
                param.grad = None
            group = self.param_to_bucket_group[param]
            if self.ddp_config.overlap_grad_reduce and group not in self.late_groups:
                group.register_grad_ready(param)

        return hook

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Send what has not been sent, and wait for all sums; and for weights that no forward pass has asked for."""
        self.wait_for_weights()
        if self.ddp_config.overlap_grad_reduce:
            for group in self.late_groups:  # in flight together; Megatron-Core would send and wait one by one
                group.start_grad_sync(force_all_reduce)
        super().finish_grad_sync(force_all_reduce)
        self._has_weights()

    def _has_weights(self) -> None:
        """Weights are complete: a module's call must not ask for them."""
        for group in self.bucket_groups:
            group.param_gather_dispatched = True

    def ask_for_weights(self) -> None:
        """Begin to gather what the other ranks' optimizers have updated; nothing to do without overlap."""
        if self.ddp_config.overlap_param_gather:
            for group in reversed(self.bucket_groups):
                group.start_param_sync()

    def wait_for_weights(self) -> None:
        """The weights may be read, and written, outside of a forward pass from here on."""
        if self.ddp_config.overlap_param_gather:
            for group in reversed(self.bucket_groups):
                group.finish_param_sync(True)
