"""What one rank does for the parity check: build, run the real train step, hand back what it saw."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_vl.checkpoint.hf_load import HFCheckpoint
from megatron_vl.checkpoint.hf_names import global_name
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.batch import MicroBatch
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parity.reference import Batches, micro_batches
from megatron_vl.plan.vision_share import CROP, GLOBAL
from megatron_vl.train.build import Parts, build
from megatron_vl.train.step import forward_backward, train_step


@dataclass
class Seen:
    """One rank's part of the answer; tensors on CPU.

    views[(micro_batch, kind, name)]: ``[n, tokens, channels]`` of this rank's views. rows[(micro_batch, name)]:
    ``[local tokens, b, channels]`` (``ce``: ``[b, local tokens]``). gradients: our global names. losses: one per
    step (one when no step is taken).
    """

    rank: int
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    grad_norms: list[float] = field(default_factory=list)
    views: dict[tuple[int, int, str], torch.Tensor] = field(default_factory=dict)
    rows: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """steps: 0 = one forward and backward with everything recorded; n = n AdamW steps, losses recorded.

    plant: called on every rank with the built parts before the run; tests plant faults through it.
    """

    config: RunConfig
    directory: str
    batches: Batches
    steps: int = 0
    lr: float = 1e-3
    plant: Callable[[Parts], None] | None = None


def run(job: Job) -> Seen:
    """The function that ``LocalWorld.run`` calls on every rank."""
    config = job.config
    device = choose_device(config.parallel.device, int(os.environ.get("LOCAL_RANK", 0)))
    runtime = start(config.parallel, config.train.seed, device)
    parts = build(config, runtime, HFCheckpoint(job.directory).tensor, with_optimizer=job.steps > 0)
    feed = micro_batches(job.batches, config.model, runtime.layout, runtime.rank)
    seen = Seen(runtime.rank)
    if job.plant is not None:
        job.plant(parts)
    if job.steps:
        for _ in range(job.steps):
            result = train_step(parts, feed, job.lr)
            seen.losses.append(result.loss)
            seen.grad_norms.append(result.grad_norm)
        return seen
    _record(parts, seen, feed)
    for chunk in parts.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    loss, seen.tokens = forward_backward(parts, feed)
    seen.losses.append(loss)
    for chunk, stage in zip(parts.chunks, parts.stages):
        gather_gradients(chunk)
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                seen.gradients[global_name(name, stage.layers)] = (
                    parameter.main_grad.detach().float().cpu().clone()
                )
    return seen


def gather_gradients(chunk: DistributedDataParallel) -> None:
    """Make every gradient whole on every rank again: the distributed optimizer leaves each rank only its shard."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for group in chunk.bucket_groups:
        peers = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            mine = bucket.grad_data.chunk(peers.size())[peers.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=peers)


def _record(parts: Parts, seen: Seen, feed: Sequence[MicroBatch]) -> None:
    """Hooks that copy the intermediate tensors of the reference file's list."""
    if parts.tower is not None:
        _record_step(parts.tower.module, seen, feed)
    for chunk, stage in zip(parts.pipeline, parts.stages):
        model = chunk.module
        if model.vision_model is not None:
            _record_vision(model, seen)
        if model.pre_process:
            _record_rows(seen, model.language_model.decoder, "embeds", of_input=True)
        for layer, number in zip(model.language_model.decoder.layers, stage.layers):
            _record_rows(seen, layer, f"hidden{number}")
        if model.post_process:
            _record_logits(seen, model.language_model)
            _record_rows(seen, model, "ce")


def _record_vision(model: torch.nn.Module, seen: Seen) -> None:
    vision = model.vision_model
    state = {"kind": GLOBAL, "micro_batch": -1, "crops": None}

    def enter_stage(module, args):
        state["micro_batch"] += 1
        state["crops"] = args[0].crop_pixels

    def enter_tower(module, args):
        state["kind"] = CROP if args[0] is state["crops"] else GLOBAL  # both may have the same size

    def keep(name: str):
        def hook(module, args, output):
            place = (state["micro_batch"], state["kind"], name)
            seen.views[place] = _of_views(output)

        return hook

    model.register_forward_pre_hook(enter_stage)
    vision.register_forward_pre_hook(enter_tower)
    _hook_tower(model, keep)


def _record_step(tower: torch.nn.Module, seen: Seen, feed: Sequence[MicroBatch]) -> None:
    """Of a tower beside the pipeline: crops of all micro-batches come in order, then global views, in any waves.

    feed: with this rank's pixels. A second pass, for gradients, is not recorded.
    """
    wanted = [(number, CROP) for number, batch in enumerate(feed) for _ in batch.crop_pixels]
    wanted += [(number, GLOBAL) for number, batch in enumerate(feed) for _ in batch.global_pixels]

    def keep(name: str):
        left = list(wanted)

        def hook(module, args, output):
            for view in _of_views(output) if left else ():
                place = (*left.pop(0), name)
                before = [seen.views[place]] if place in seen.views else []
                seen.views[place] = torch.cat([*before, view[None]])

        return hook

    _hook_tower(tower, keep)


def _of_views(output: torch.Tensor | tuple) -> torch.Tensor:
    """``[tokens, n, channels] -> [n, tokens, channels]`` fp32 on the CPU."""
    out = output[0] if isinstance(output, tuple) else output
    return out.detach().float().cpu().transpose(0, 1).clone()


def _hook_tower(model: torch.nn.Module, keep: Callable[[str], Callable]) -> None:
    """keep: makes the hook of an intermediate tensor from its name."""
    vision = model.vision_model
    vision.ln_pre.register_forward_hook(keep("embed"))
    for number, layer in enumerate(vision.transformer.layers):
        layer.register_forward_hook(keep(f"block{number}"))
    vision.transformer.register_forward_hook(keep("tower"))
    vision.vit_downsampler1.register_forward_hook(keep("down1"))
    vision.register_forward_hook(keep("down2"))
    model.projector.register_forward_hook(keep("projected"))


def _record_logits(seen: Seen, language_model: torch.nn.Module) -> None:
    """The loss never has all logits: they are computed beside it, by Megatron-Core's own head."""
    _record_rows(seen, language_model.output_layer, "logits")

    @torch.no_grad()
    def hook(module, args, output):
        language_model.output_layer(output)

    language_model.decoder.register_forward_hook(hook)


def _record_rows(seen: Seen, module: torch.nn.Module, name: str, of_input: bool = False) -> None:
    calls = [0]

    def hook(module, args, kwargs, output):
        value = kwargs["hidden_states"] if of_input else output
        value = value[0] if isinstance(value, tuple) else value
        seen.rows[calls[0], name] = value.detach().float().cpu().clone()
        calls[0] += 1

    module.register_forward_hook(hook, with_kwargs=True)
