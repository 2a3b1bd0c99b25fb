"""What the tests of this folder run on the ranks."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from megatron_vl.bench import collectives
from megatron_vl.bench.against_plain import in_turns, plain_step
from megatron_vl.bench.quick_weights import QuickWeights
from megatron_vl.bench.step_rank import measure
from megatron_vl.bench.synthetic import micro_batches, shape_of
from megatron_vl.config.load import LoadedRun
from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.ops.cross_entropy import Scoring, score_tokens
from megatron_vl.parallel.heartbeat import Phase
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.train.build import build
from megatron_vl.train.step import stage_inputs, train_step


def step_on_rank(config: RunConfig, options: argparse.Namespace) -> tuple[str, dict[str, Any], bool]:
    """`benchmark_throughput.py step` without its launcher."""
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    return measure(LoadedRun(config, {}), False, runtime, Phase("testing"), options)


def collectives_on_rank(kib: list[int], repeats: int) -> dict[str, Any]:
    """The record of `benchmark_throughput.py collectives` over two data-parallel ranks."""
    config = RunConfig(parallel=ParallelConfig(device="cpu"))
    return collectives.measure(config, start(config.parallel, 1, choose_device("cpu")), kib, repeats)


def against_plain(config: RunConfig, turns: int) -> dict[str, Any]:
    """Steps of ours and of plain PyTorch in turns."""
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    parts = build(config, runtime, QuickWeights(config.model, config.train.seed))
    batches = micro_batches(config, runtime.layout, 0, shape_of(config, runtime.layout))
    return in_turns(lambda: train_step(parts, batches, 1e-4).loss, plain_step(config, batches), 0, turns)


def _attention(query, key, value, *_, scale=None, out_shape=None) -> int:
    heads = query[1]
    return sdpa_flop_count(query, (key[0], heads, *key[2:]), (value[0], heads, *value[2:]))


def _attention_backward(grad, query, key, value, *_, scale=None, out_shape=None) -> int:
    heads = query[1]
    return sdpa_backward_flop_count(grad, query, (key[0], heads, *key[2:]), (value[0], heads, *value[2:]))


def _added_product(total, left, right, *_, out_shape=None) -> int:
    return 2 * left[0] * left[1] * right[1]


# What PyTorch's counter does not know: attention on a CPU, by its own formula for a GPU's; a product in place.
UNKNOWN = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _added_product,
}


def counted(run: Any) -> int:
    """FLOPs that PyTorch counts while ``run`` runs."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        run()
    return counter.get_total_flops()


def flops_on_rank(config: RunConfig) -> dict[str, int]:
    """FLOPs of the model's parts, forward, and of a whole forward and backward pass, as PyTorch counts them."""
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    parts = build(config, runtime, QuickWeights(config.model, 1), with_optimizer=False)
    chunk = parts.chunks[0].module
    model, batches = config.model, micro_batches(config, runtime.layout, 0, shape_of(config, runtime.layout))
    inputs = stage_inputs(batches[0], runtime.device)
    found = {}
    with torch.no_grad():
        for kind, pixels in (("crop", inputs.crop_pixels), ("global", inputs.global_pixels)):
            found[f"{kind}_tower"] = counted(lambda: chunk.vision_model(pixels))
            features = chunk.vision_model(pixels)
            found[f"{kind}_projector"] = counted(lambda: chunk.projector(features))
            found[f"{kind}_views"] = len(pixels)
        hidden = chunk._hidden_states(inputs)
        found["decoder_and_views"] = counted(lambda: chunk._hidden_states(inputs))
        weight = chunk.language_model.output_layer.weight
        labels = torch.randint(model.text.vocab_size, inputs.labels.shape)  # every position scored
        found["head"] = counted(lambda: score_tokens(hidden, weight, labels, chunk.head, Scoring()))
    chunk.train()
    found["step"] = counted(lambda: chunk(inputs).sum().backward())
    return found
