"""What the tests of this folder run on the ranks, and how they put the answers together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

from megatron_vl.checkpoint.hf_names import global_name
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import ParallelConfig, RecomputeConfig, RunConfig
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parity.compare import Assembled
from megatron_vl.parity.layouts import parse_layout
from megatron_vl.parity.on_rank import Seen, gather_gradients
from megatron_vl.parity.reference import Batches, Document, arrange, micro_batches
from megatron_vl.plan.layout import Layout
from megatron_vl.train.build import Parts, build
from megatron_vl.train.step import forward_backward, train_step
from tests.fixtures.small import RandomWeights


def build_parts(config: RunConfig, with_optimizer: bool = False) -> Parts:
    """This rank's part of the model with random weights."""
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    return build(config, runtime, RandomWeights(config.model), with_optimizer=with_optimizer)


def gradients_on_rank(config: RunConfig, batches: Batches) -> Seen:
    """One forward and backward pass of the train step; gradients of what is trained."""
    parts = build_parts(config)
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
            else:
                assert parameter.grad is None and getattr(parameter, "main_grad", None) is None, name
    return seen


def steps_on_rank(config: RunConfig, batches: Batches, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of some optimizer steps."""
    parts = build_parts(config, with_optimizer=True)
    feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
    results = [train_step(parts, feed, 1e-3) for _ in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


@dataclass(frozen=True)
class Stepped:
    """(loss, gradient norm) of each step, and a digest of the bits of this rank's tower, "" where it has none."""

    steps: list[tuple[float, float]]
    tower: str


def stepped_on_rank(config: RunConfig, batches: Batches, steps: int) -> Stepped:
    """Some optimizer steps with clipping, and what they made of the tower."""
    parts = build_parts(replace(config, optim=replace(config.optim, clip_grad=0.1)), with_optimizer=True)
    feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
    results = [train_step(parts, feed, 1e-3) for _ in range(steps)]
    if parts.tower is None:
        return Stepped([(result.loss, result.grad_norm) for result in results], "")
    values = b"".join(p.detach().numpy().tobytes() for p in parts.tower.module.parameters())
    digest = hashlib.sha256(values).hexdigest()
    return Stepped([(result.loss, result.grad_norm) for result in results], digest)


def run_of(
    model: ModelConfig,
    layout: str,
    placement: str,
    docs: Sequence[Document],
    packed: bool = False,
    recompute: RecomputeConfig | None = None,
    **parallel: Any,
) -> tuple[RunConfig, Batches, Layout]:
    """Description, rows and layout of a run. parallel: further keys of `ParallelConfig`."""
    named = parse_layout(layout, placement, "cpu")
    described: ParallelConfig = replace(named.parallel, **parallel)
    place = Layout.from_config(described, named.world_size)
    config = RunConfig(model=model, parallel=described, recompute=recompute or RecomputeConfig())
    return config, arrange(docs, place, packed), place


def gradients(
    world: Any, model: ModelConfig, layout: str, placement: str, docs: Sequence[Document], **options: Any
):
    """(loss, gradients under released names) of one step in a layout; options as in `run_of`."""
    config, batches, place = run_of(model, layout, placement, docs, **options)
    seen = world.run(place.world_size, gradients_on_rank, config, batches)
    return seen[0].losses[0], Assembled(seen, place, batches, docs, model).gradients()


def counted_gradients(config: RunConfig, batches: Batches) -> tuple[Seen, int]:
    """`gradients_on_rank` with nothing too small to off-load, and the bytes that left."""
    from megatron_vl.model import step3_vl
    from megatron_vl.model.offload import Offload

    made: list[Offload] = []

    def offload(parameters):
        made.append(Offload(parameters, smallest=0))
        return made[-1]

    with patch.object(step3_vl, "Offload", offload):
        seen = gradients_on_rank(config, batches)
    return seen, sum(moved.bytes for moved in made)


def gradients_with_offload(
    world: Any, model: ModelConfig, layout: str, docs: Sequence[Document], decoder: str, offload: bool
):
    """((loss, gradients), bytes that left on the first rank) of one step of packed rows."""
    recompute = RecomputeConfig(decoder=decoder, offload=offload)
    config, batches, place = run_of(model, layout, "data", docs, packed=True, recompute=recompute)
    answers = world.run(place.world_size, counted_gradients, config, batches)
    seen = [answer for answer, _ in answers]
    whole = Assembled(seen, place, batches, docs, model).gradients()
    return (seen[0].losses[0], whole), answers[0][1]


def steps(world: Any, model: ModelConfig, layout: str, placement: str, docs: Sequence[Document], count: int):
    """(loss, gradient norm) per step, which all ranks must agree on."""
    config, batches, place = run_of(model, layout, placement, docs)
    answers = world.run(place.world_size, steps_on_rank, config, batches, count)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def tower_on_rank(model: ModelConfig) -> dict[str, Any]:
    """How outputs change with the last patch of a view, and with the last token of a row."""
    parts = build_parts(RunConfig(model=model))
    (chunk,) = parts.chunks
    net = chunk.module
    kept: list[torch.Tensor] = []
    net.vision_model.transformer.register_forward_hook(lambda m, args, out: kept.append(out))
    pixels = torch.randn(1, 3, model.vision.image_size, model.vision.image_size)
    changed = pixels.clone()
    changed[..., -model.vision.patch_size :, -model.vision.patch_size :] += 1
    with torch.no_grad():
        for view in (pixels, changed):
            net.vision_model(view)
        logits = []
        ids = torch.arange(16)[None]
        other = ids.clone()
        other[0, -1] = 99
        for row in (ids, other):
            embeddings = net.language_model.embedding(input_ids=row, position_ids=None)
            out = net.language_model(
                input_ids=None, position_ids=None, attention_mask=None, decoder_input=embeddings, labels=None
            )
            logits.append(out[0])
    return {
        "first patch": (kept[0][0] - kept[1][0]).abs().max().item(),
        "earlier tokens": (logits[0][:-1] - logits[1][:-1]).abs().max().item(),
        "last token": (logits[0][-1] - logits[1][-1]).abs().max().item(),
        "vision names": [name for name, _ in net.vision_model.named_parameters()],
        "all names": [name for name, _ in net.named_parameters()],
        "tables": (
            net.vision_model.position_table(4).detach(),
            net.vision_model.positional_embedding.detach(),
        ),
    }
