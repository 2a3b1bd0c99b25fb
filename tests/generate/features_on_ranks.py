"""Features of image files in a layout, counted."""

from __future__ import annotations

import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import DataError
from megatron_vl.generate.features import FeatureStore
from megatron_vl.generate.prompts import PromptBuilder
from megatron_vl.generate.request import Prompt, SamplingParams, requests_for
from megatron_vl.generate.rollout import LocalRollouts
from tests.generate.on_ranks import Asked, model_parts, plain_inputs

SAMPLING = SamplingParams(4, temperature=0.0)


def ensured_on_rank(config: RunConfig, samples: list, folder: str, change: float = 0.0) -> dict:
    """Counts of a first and a second call, what features say, and how often the tower ran on this rank.

    change: added to a weight of the tower before.
    """
    parts = model_parts(config)
    runs = [0]
    tower = (parts.tower or parts.chunks[0]).module.vision_model
    if tower is not None:
        tower.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
        with torch.no_grad():
            tower.positional_embedding[0, 0] += change
    builder = PromptBuilder(config.data, config.model)
    built = [builder.build(sample) for sample in samples]
    images = [image for _, found in built for image in found]
    store = FeatureStore(parts, builder.images, folder)
    counts = []
    for _ in range(2):
        store.ensure(images)
        counts.append((store.counts.found, store.counts.computed, store.counts.damaged))
    prompts = [prompt for prompt, _ in built]
    features = None
    if parts.runtime.is_first_stage:
        features = {digest: store.features([digest]).clone() for p in prompts for digest in p.images}
    answers = LocalRollouts(parts, store.features).generate(list(requests_for(prompts, 1, 0)), SAMPLING)
    return {
        "counts": counts,
        "runs": runs[0],
        "features": features,
        "answers": [(r.tokens, r.logprobs) for r in answers],
    }


def refused_on_rank(config: RunConfig, samples: list, folder: str) -> str:
    """Why the features of these samples cannot be computed."""
    try:
        ensured_on_rank(config, samples, folder)
    except DataError as error:
        return str(error)
    return "computed"


def fused_on_rank(config: RunConfig, samples: list, folder: str) -> list[float]:
    """Largest difference of the training logits with features from the store and with pixels, per sample."""
    parts = model_parts(config)
    (chunk,) = (c.module.eval() for c in parts.chunks)
    builder = PromptBuilder(config.data, config.model)
    store = FeatureStore(parts, builder.images, folder)
    far = []
    for sample in samples:
        prompt, images = builder.build(sample)
        store.ensure(images)
        pixels = tuple(
            (crops, whole)
            for whole, crops in (builder.images.views(image.source, image.plan) for image in images)
        )
        far.append(difference(chunk, store, prompt, pixels))
    return far


@torch.no_grad()
def difference(chunk, store: FeatureStore, prompt: Prompt, pixels: tuple) -> float:
    from dataclasses import replace

    inputs = plain_inputs(Asked(prompt, pixels), prompt.ids)
    without = replace(
        inputs,
        crop_pixels=inputs.crop_pixels[:0],
        global_pixels=inputs.global_pixels[:0],
        features=store.features(prompt.images) if prompt.images else None,
    )
    return (chunk.logits(inputs) - chunk.logits(without)).abs().max().item()
