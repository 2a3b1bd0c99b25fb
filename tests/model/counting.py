"""Count FLOPs and views on a rank while the train step runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_vl.config.schema import RunConfig
from megatron_vl.parity.reference import Batches, micro_batches
from megatron_vl.train.step import forward_backward
from tests.model.on_ranks import build_parts


@dataclass(frozen=True)
class Counted:
    """forward, step: FLOPs of a forward pass, and of forward and backward. views: (crops, globals) per
    micro-batch that the tower of this rank encoded, in the step."""

    forward: int
    step: int
    views: list[tuple[int, int]]


def attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Both products of the CPU kernel, whole rectangles, which torch does not count by itself."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def attention_backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Gradients of q, k, v and of the probabilities, and the scores once more: five products for two."""
    return attention(query, key, value) * 5 // 2


KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def count_on_rank(config: RunConfig, batches: Batches) -> Counted:
    """FLOPs of all micro-batches of this rank."""
    parts = build_parts(config)
    feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
    views = [[0, 0] for _ in feed]
    tower = parts.chunks[0].module.vision_model
    calls = [-1]

    def enter(module, args):
        calls[0] += 1

    def count(module, args):
        kind = 0 if args[0].shape[-1] == config.model.vision.crop_size else 1
        views[calls[0] % len(feed)][kind] += args[0].shape[0]

    with FlopCounterMode(display=False, custom_mapping=KERNELS) as forward:
        forward_backward(parts, feed, forward_only=True)
    if tower is not None:
        parts.chunks[0].module.register_forward_pre_hook(enter)
        tower.register_forward_pre_hook(count)
    for chunk in parts.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as step:
        forward_backward(parts, feed)
    return Counted(forward.get_total_flops(), step.get_total_flops(), [tuple(v) for v in views])
