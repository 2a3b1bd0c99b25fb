"""Build one rank of a layout of any size without memory, and let it take one step: `python -m megatron_vl plan --rank`.

Modules, DDP, optimizer, schedule and step are those of a run (`train/build.py`, `train/step.py`); only the tensors have
no memory (`parallel/shapes.py`) and the other ranks do not exist (`parallel/fake.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.batch import MicroBatch
from megatron_vl.data.template import NOT_SCORED
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.fake import described_rank
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.parallel.shapes import META, Message
from megatron_vl.plan.candidates import Candidate
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.kept import Load
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.overlap import overlap_of
from megatron_vl.plan.rank_state import Messages, RankState, Shape, dry_microbatches
from megatron_vl.plan.search import IMAGE_CROPS, Question
from megatron_vl.plan.sequence import row_multiple
from megatron_vl.plan.tensors import Weight
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_step
from megatron_vl.train.build import Parts, build
from megatron_vl.train.step import train_step


def build_rank(question: Question, candidate: Candidate, rank: int) -> RankState:
    """What the rank holds and exchanges, behind a step of `dry_microbatches` micro-batches.

    Raises:
        ConfigError: the run cannot be built without a GPU, or an image of the plan does not fit a row.
    """
    config = buildable(question, candidate)
    world, seed = question.world_size, config.train.seed
    with described_rank(config.parallel, seed, rank, world) as (runtime, mode):
        batches = micro_batches(question, candidate, runtime)
        parts = build(config, runtime, None)
        with _results(parts) as results:
            train_step(parts, batches, lr=1.0)
        # of a pipeline of two, Megatron-Core sends one direction through the group of all ranks
        pipeline = {group.group_name for group in (runtime.groups.pp, runtime.groups.world)}
        of_pipeline = [message for message in mode.messages if message.group in pipeline]
        return RankState(
            weights=tuple(_weights(chunk.module) for chunk in parts.chunks),
            buffers=sum(buffer.numel() for chunk in parts.chunks for buffer in chunk.module.buffers()),
            weight_bytes=allocated(p for chunk in parts.chunks for p in chunk.module.parameters()),
            gradient_bytes=allocated(buffer.grad_data for chunk in parts.chunks for buffer in chunk.buffers),
            optimizer_bytes=_optimizer_bytes(parts),
            results=tuple(_only(shapes) for shapes in results),
            received=_counted(of_pipeline, received=True),
            sent=_counted(of_pipeline, received=False),
        )


def buildable(question: Question, candidate: Candidate) -> RunConfig:
    """The run with everything decided that a run decides by its device: formats and overlap as on the device of the
    plan, layers of PyTorch without kernels of ours, which have the same weights.

    Raises:
        ConfigError: FP8.
    """
    config = candidate.run(question.config)
    if config.precision.fp8 != "none":
        raise ConfigError(
            f"precision.fp8 = {config.precision.fp8}: its products need a GPU; for --rank use precision.fp8=none, the "
            "weights are the same"
        )
    layout = candidate.layout
    overlap = overlap_of(config.parallel, layout.dp * layout.cp, question.device.on_cpu)
    parallel = replace(
        config.parallel,
        layer_backend="torch",
        norms="torch",
        flash_attention="built_in",
        fused_kernels="never",
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
    )
    params = "bf16" if question.element == 2 else "fp32"
    return replace(config, parallel=parallel, precision=replace(config.precision, params=params))


def micro_batches(question: Question, candidate: Candidate, runtime: Runtime) -> list[MicroBatch]:
    """What the rank is handed for the step: the plan's rows, and pixels without memory of its share of their views."""
    config, layout = candidate.run(question.config), candidate.layout
    batch = whole_batch(config, layout, question.load(candidate.micro_batch))
    count = dry_microbatches(layout, candidate.num_microbatches)
    if not layout.encodes(runtime.coords):
        return [batch] * count
    kinds = [batch.view_kinds] * count
    shares = share_step(kinds, layout.vision_size, view_costs(config.model), layout.tower_beside)
    mine = [
        [batch.view_kinds[view] for view in share[layout.vision_rank(runtime.coords)]] for share in shares
    ]
    vision, fast = config.model.vision, config.data.image_mode == "fast"

    def pixels(views: list[int], kind: int, side: int) -> torch.Tensor:
        dtype = torch.uint8 if fast else torch.float32
        return torch.empty((views.count(kind), 3, side, side), dtype=dtype, device=META)

    return [
        replace(
            batch,
            crop_pixels=pixels(views, CROP, vision.crop_size),
            global_pixels=pixels(views, GLOBAL, vision.image_size),
        )
        for views in mine
    ]


def whole_batch(config: RunConfig, layout: Layout, load: Load) -> MicroBatch:
    """Rows of the plan without pixels: images first, then words that are all scored.

    Raises:
        ConfigError: the images do not fit.
    """
    vision, images = config.model.vision, load.globals // load.rows
    visual = images * (IMAGE_CROPS * vision.crop_tokens + vision.global_tokens)
    if visual > load.tokens:
        raise ConfigError(
            f"data.seq_length = {load.tokens}: the plan's images are {visual} tokens a row; raise it, or use "
            "--visual-share 0"
        )
    slot = config.model.tokens.im_patch
    ids = torch.full((load.rows, load.tokens), 0 if slot else 1, dtype=torch.int64)
    ids[:, :visual] = slot
    labels = ids.clone()
    labels[:, :visual] = NOT_SCORED
    bounds = document_bounds(config, layout, load)
    lengths = [load.tokens] * load.rows if bounds is None else [b - a for a, b in zip(bounds, bounds[1:])]
    return MicroBatch(
        input_ids=ids,
        labels=labels,
        cu_seqlens=bounds,
        doc_lengths=lengths,
        view_kinds=([CROP] * IMAGE_CROPS + [GLOBAL]) * images * load.rows,
        crop_pixels=torch.empty(0, 3, vision.crop_size, vision.crop_size),
        global_pixels=torch.empty(0, 3, vision.image_size, vision.image_size),
        sample_ids=[f"row {row}" for row in range(load.rows)],
    )


def document_bounds(config: RunConfig, layout: Layout, load: Load) -> list[int] | None:
    """Boundaries of the documents of a packed row, cut down to multiples that ranks can share; None for dense rows."""
    if not config.data.packing.enabled:
        return None
    multiple = row_multiple(layout.tp, layout.cp, layout.sp)
    cut = [end // multiple * multiple for end in accumulate(load.documents)]
    return sorted({0, *cut, load.tokens})


@contextmanager
def _results(parts: Parts) -> Iterator[list[set[Shape]]]:
    """The shapes of what each chunk of the pipeline gives, while it is entered."""
    found: list[set[Shape]] = [set() for _ in parts.pipeline]

    def hook(seen: set[Shape]):
        return lambda module, inputs, result: seen.add(tuple(result.shape))

    handles = [chunk.module.register_forward_hook(hook(seen)) for chunk, seen in zip(parts.pipeline, found)]
    yield found
    for handle in handles:
        handle.remove()


def _only(shapes: set[Shape]) -> Shape:
    assert len(shapes) == 1, f"micro-batches of one step have results of several shapes: {shapes}"
    return next(iter(shapes))


def _weights(chunk: torch.nn.Module) -> tuple[Weight, ...]:
    parts = {"vision_model": "vision", "projector": "projector"}
    return tuple(
        Weight(name, p.numel(), parts.get(name.partition(".")[0], "decoder"))
        for name, p in chunk.named_parameters()
    )


def allocated(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes behind the tensors, each storage once; without memory storages have no address to be told apart by."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizer_bytes(parts: Parts) -> int:
    """Bytes of what the optimizer steps, where it is not the model's own, and of its state."""
    found: list[torch.Tensor] = []
    for part in getattr(parts.optimizer, "chained_optimizers", [parts.optimizer]):
        if part.optimizer is not None:
            found += [p for group in part.optimizer.param_groups for p in group["params"]]
            found += [t for state in part.optimizer.state.values() for t in state.values()]
    own = {p.untyped_storage()._cdata for chunk in parts.chunks for p in chunk.module.parameters()}
    return allocated(t for t in found if t.untyped_storage()._cdata not in own)


def _counted(messages: Iterable[Message], received: bool) -> Messages:
    found = Counter((m.shape, m.dtype.itemsize) for m in messages if m.received == received)
    return tuple((*kind, count) for kind, count in sorted(found.items()))
