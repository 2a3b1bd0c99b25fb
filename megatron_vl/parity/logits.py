"""Two sets of weights of one model run on the same few documents: do they compute the same?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from megatron_vl.checkpoint.weights import CheckpointWeights, HFWeights, open_weights
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.same_model import model_differences
from megatron_vl.config.schema import ParallelConfig, PrecisionConfig, RunConfig
from megatron_vl.data.batch import MicroBatch
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parallel.world import LocalWorld
from megatron_vl.parity.reference import Document, arrange, micro_batches
from megatron_vl.plan.cost import parameters
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.vision_share import CROP, GLOBAL
from megatron_vl.train.build import build
from megatron_vl.train.step import stage_inputs

MAX_RELATIVE = 1e-5
ROOM = 1.3  # buffers and activations besides the fp32 weights
HOURS = 3600.0
SEED = 20260109

Source = CheckpointWeights | HFWeights


def compare_logits(left: Source, right: Source) -> tuple[str, bool]:
    """Run both in fp32 on one CPU process, one after the other. Returns a line to print, and whether they agree.

    They agree when the logits' relative L2 distance is at most 1e-5.

    Raises:
        CheckpointError: the two are different models, or the model does not fit into memory.
    """
    differing = [path for path, _, _ in model_differences(right.model, left.model)]
    if differing:
        raise CheckpointError(
            f"--logits: {left.folder} and {right.folder} are different models ({', '.join(differing)}); leave it out"
        )
    needed, free = 4 * ROOM * parameters(left.model)["total"], psutil.virtual_memory().available
    if needed > free:
        raise CheckpointError(
            f"--logits runs in fp32: {needed / 1e9:.1f} GB of memory are needed, {free / 1e9:.1f} GB are free; use a "
            "larger machine, or leave it out: equal bits give equal logits"
        )
    with LocalWorld(1) as world:
        a, b = (world.run(1, logits_on_rank, source.folder, limit=6 * HOURS)[0] for source in (left, right))
    distance = max(
        (torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(x)).item() for x, y in zip(a, b)
    )
    agreeing = torch.cat([x.argmax(-1) == y.argmax(-1) for x, y in zip(a, b)]).double().mean().item()
    same = distance <= MAX_RELATIVE
    tokens = sum(len(x) for x in a)
    text = (
        f"logits of {tokens} tokens in {len(a)} documents: relative L2 {distance:.1e} (accepted {MAX_RELATIVE:.0e}), "
        f"same best token at {agreeing:.2%}"
    )
    return text, same


@torch.no_grad()
def logits_on_rank(folder: Path) -> list[torch.Tensor]:
    """fp32 logits ``[S, vocabulary]`` of `example_documents`, by the only rank of a world."""
    source = open_weights(folder)
    # frozen: no gradients are needed, and their buffers would take as much room as the weights
    model = replace(source.model, freeze_vision=True, freeze_projector=True, freeze_decoder=True)
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(device="cpu", use_distributed_optimizer=False),
        precision=PrecisionConfig(params="fp32"),
    )
    device = choose_device("cpu")
    runtime = start(config.parallel, config.train.seed, device)
    weights = source.weights
    parts = build(config, runtime, lambda name: weights[name].read(), with_optimizer=False)
    chunk = parts.chunks[0].module.eval()
    batches = example_batches(model)
    whole = [chunk.logits(stage_inputs(batch, device)) for batch in batches]
    return [
        logits[:length, 0].float() for logits, batch in zip(whole, batches) for length in batch.doc_lengths
    ]


def example_batches(model: ModelConfig) -> list[MicroBatch]:
    """One micro-batch per document."""
    return micro_batches(arrange(example_documents(model), Layout(), packed=False), model, Layout(), 0)


def example_documents(model: ModelConfig) -> list[Document]:
    """Text alone, and text with an image of two crops; a function of the model's dimensions alone.

    A vocabulary without the image tokens leaves out the image.
    """
    generator = torch.Generator().manual_seed(SEED)
    special, vocabulary = set(asdict(model.tokens).values()), model.text.vocab_size
    plain = np.array([i for i in range(min(vocabulary, 4096)) if i not in special])

    def text(length: int) -> list[int]:
        return plain[torch.randint(len(plain), (length,), generator=generator).numpy()].tolist()

    def document(number: int, ids: Sequence[int], kinds: list[int]) -> Document:
        sides = {CROP: model.vision.crop_size, GLOBAL: model.vision.image_size}
        pixels = [torch.randn(3, sides[kind], sides[kind], generator=generator) for kind in kinds]
        array = np.array(ids, dtype=np.int64)
        return Document(number, array, np.append(array[1:], -100), kinds, pixels)

    tokens, vision = model.tokens, model.vision
    made = [document(0, text(24), [])]
    if max(special) < vocabulary:
        crop = [tokens.patch_start, *[tokens.im_patch] * vision.crop_tokens, tokens.patch_end]
        whole = [tokens.im_start, *[tokens.im_patch] * vision.global_tokens, tokens.im_end]
        made.append(document(1, [*text(5), *crop, *crop, *whole, *text(11)], [CROP, CROP, GLOBAL]))
    return made
