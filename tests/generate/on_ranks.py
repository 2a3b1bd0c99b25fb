"""What the tests of this folder run on the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.batch import Row, collate
from megatron_vl.errors import ConfigError
from megatron_vl.generate.features import encode
from megatron_vl.generate.request import (
    Prompt,
    Request,
    Response,
    SamplingParams,
    forbidden_ids,
    requests_for,
)
from megatron_vl.generate.rollout import LocalRollouts
from megatron_vl.generate.weight_version import weight_version
from megatron_vl.model.step3_vl import StageInputs
from megatron_vl.parallel.context_parallel import take_local
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parity.reference import Document, micro_batches
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.vision_share import CROP, GLOBAL
from megatron_vl.train.build import Parts, build
from megatron_vl.train.step import run_schedule, stage_inputs, train_step
from tests.fixtures.small import RandomWeights


@dataclass(frozen=True)
class Asked:
    """A prompt with the pixels of its images: per image (crops [n, 3, C, C], global [1, 3, G, G])."""

    prompt: Prompt
    pixels: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def asked_of(doc: Document, model: Any) -> Asked:
    """The part of a document in front of its scored tokens."""
    scored = (doc.targets != -100).nonzero()[0]
    ids = doc.ids[: scored[0] + 1] if len(scored) else doc.ids
    pixels, crops = [], []
    side = model.vision.crop_size
    for kind, view in zip(doc.kinds, doc.pixels, strict=True):
        if kind == CROP:
            crops.append(view)
            continue
        pixels.append((torch.stack(crops) if crops else torch.empty(0, 3, side, side), view[None]))
        crops = []
    name = f"p{doc.number}"
    images = tuple(f"{name}/{number}" for number in range(len(pixels)))
    return Asked(Prompt(name, tuple(ids.tolist()), tuple(doc.kinds), images), tuple(pixels))


def model_parts(config: RunConfig, source: Callable | None = None, with_optimizer: bool = False) -> Parts:
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    return build(config, runtime, source or RandomWeights(config.model), with_optimizer)


def features_of(parts: Parts, asked: Sequence[Asked]) -> Callable[[Sequence[str]], torch.Tensor]:
    """Features by digest, computed by each rank of the first stage for itself."""
    known: dict[str, torch.Tensor] = {}
    if parts.runtime.is_first_stage:
        for one in asked:
            for name, (crops, whole) in zip(one.prompt.images, one.pixels, strict=True):
                known[name] = encode(parts, crops, whole)
    return lambda images: torch.cat([known[image] for image in images])


def responses_on_rank(
    config: RunConfig,
    asked: Sequence[Asked],
    requests: Sequence[Request],
    params: SamplingParams,
    source: Callable | None = None,
) -> list[Response]:
    parts = model_parts(config, source)
    for chunk in parts.chunks:
        chunk.train()
    before = state_of(parts)
    found = LocalRollouts(parts, features_of(parts, asked)).generate(requests, params)
    assert state_of(parts) == before
    return found


def state_of(parts: Parts) -> list[tuple]:
    """Everything that sampling switches, module by module."""
    return [
        (name, m.training, getattr(m, "sequence_parallel", None), getattr(m, "cache", None))
        + (
            getattr(getattr(m, "config", None), "sequence_parallel", None),
            getattr(m, "input_tensor", None) is None,
        )
        for chunk in parts.chunks
        for name, m in chunk.named_modules()
    ]


def plain_inputs(asked: Asked, ids: Sequence[int]) -> StageInputs:
    crops = [crops for crops, _ in asked.pixels] or [torch.empty(0, 3, 1, 1)]
    whole = [whole for _, whole in asked.pixels] or [torch.empty(0, 3, 1, 1)]
    row = torch.tensor([list(ids)])
    kinds = list(asked.prompt.view_kinds)
    return StageInputs(
        row, torch.full_like(row, -100), None, [len(ids)], kinds, torch.cat(crops), torch.cat(whole), ["x"]
    )


def plain_on_rank(
    config: RunConfig,
    asked: Sequence[Asked],
    max_tokens: int,
    stop_ids: Sequence[int],
    source: Callable | None = None,
) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Greedy decoding by whole forward passes of the training model, one prompt at a time, pixels and all."""
    parts = model_parts(config, source)
    (chunk,) = (c.module.eval() for c in parts.chunks)
    never = list(forbidden_ids(config.model))
    found = []
    with torch.no_grad():
        for one in asked:
            ids, tokens, logprobs = list(one.prompt.ids), [], []
            while len(tokens) < max_tokens and not (tokens and tokens[-1] in stop_ids):
                logits = chunk.logits(plain_inputs(one, ids))[-1, 0, : config.model.text.vocab_size].float()
                allowed = logits.clone()
                allowed[never] = -torch.inf
                tokens.append(int(allowed.argmax()))
                logprobs.append(float(torch.log_softmax(logits, dim=-1)[tokens[-1]]))
                ids.append(tokens[-1])
            found.append((tuple(tokens), tuple(logprobs)))
    return found


def sampled_and_scored_on_rank(
    config: RunConfig,
    asked: Sequence[Asked],
    requests: Sequence[Request],
    params: SamplingParams,
    length: int,
) -> tuple[list[Response], dict[int, list[float]]]:
    """Responses, and the log-probabilities that the training forward pass of the same layout gives their tokens."""
    parts = model_parts(config)
    responses = LocalRollouts(parts, features_of(parts, asked)).generate(requests, params)
    place, scores = parts.runtime.coords, {}
    by_id = {one.prompt.prompt_id: one for one in asked}
    multiple = parts.runtime.layout.dp
    for chunk in parts.chunks:
        chunk.eval()
    for first in range(0, len(responses), multiple):
        number = min(first + place.dp, len(responses) - 1)
        response, one = responses[number], by_id[responses[number].prompt_id]
        row = training_row(one, response)
        batch = collate([row], length, config.model.tokens.endoftext, *view_sizes(config))
        batch = with_pixels(batch, one, parts)

        def step(batches: Any, model: torch.nn.Module) -> tuple:
            inputs = stage_inputs(next(batches), parts.runtime.device)
            labels = take_local(inputs.labels, None, parts.runtime.groups.cp)

            def keep(losses: torch.Tensor) -> tuple:
                return losses.sum(), (labels != -100).sum().to(torch.int), losses[labels != -100]

            return model(inputs), keep

        with torch.no_grad():
            kept = run_schedule(parts, step, [batch], forward_only=True)
        if parts.runtime.is_last_stage:
            scores[number] = sorted((-kept[0]).tolist())
    return responses, scores


def training_row(asked: Asked, response: Response) -> Row:
    import numpy as np

    ids = np.array([*asked.prompt.ids, *response.tokens], dtype=np.int64)
    labels = np.full_like(ids, -100)
    labels[len(asked.prompt.ids) :] = response.tokens
    return Row(response.prompt_id, ids, labels, asked.prompt.view_kinds)


def view_sizes(config: RunConfig) -> tuple[int, int]:
    return config.model.vision.image_size, config.model.vision.crop_size


def with_pixels(batch: Any, asked: Asked, parts: Parts) -> Any:
    """This vision rank's share of the views."""
    from megatron_vl.plan.vision_share import share_views

    if not parts.runtime.is_first_stage or not asked.pixels:
        return batch
    layout = parts.runtime.layout
    rank = layout.vision_rank(parts.runtime.coords)
    mine = share_views(asked.prompt.view_kinds, layout.vision_size, view_costs(parts.config.model))[rank]
    views = [view for crops, whole in asked.pixels for view in (*crops, *whole)]
    kinds = asked.prompt.view_kinds
    crops = [views[i] for i in mine if kinds[i] == CROP]
    whole = [views[i] for i in mine if kinds[i] == GLOBAL]
    return replace(
        batch,
        crop_pixels=torch.stack(crops) if crops else batch.crop_pixels,
        global_pixels=torch.stack(whole) if whole else batch.global_pixels,
    )


def version_on_rank(config: RunConfig, change: float) -> tuple[str, str]:
    """The version of fresh weights, and after a small change of one value of one matrix on all ranks that hold it."""
    parts = model_parts(config)
    before = weight_version(parts)
    with torch.no_grad():
        for chunk, stage in zip(parts.chunks, parts.stages):
            if stage.layers and stage.layers[0] == 0:
                weight = chunk.module.language_model.decoder.layers[0].mlp.linear_fc2.weight
                weight[0, 0] += change
    return before, weight_version(parts)


class OtherAttention(torch.nn.Module):
    """Stands for the attention of a backend that knows no cache."""


def backend_on_rank(config: RunConfig) -> str:
    """How the sampler refuses it."""
    parts = model_parts(config)
    parts.chunks[0].module.decoder.layers[1].self_attention.core_attention = OtherAttention()
    try:
        LocalRollouts(parts, features_of(parts, []))
    except ConfigError as error:
        return str(error)
    return "taken"


def trained_on_rank(
    config: RunConfig, batches: Any, asked: Sequence[Asked], sampling: bool
) -> tuple[list, list[str]]:
    """(loss, gradient norm) of three optimizer steps, with sampling in between or without; weight versions."""
    parts = model_parts(config, with_optimizer=True)
    feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
    seen, versions = [], []
    for number in range(3):
        if sampling:
            rollouts = LocalRollouts(parts, features_of(parts, asked))
            responses = rollouts.generate(
                list(requests_for([one.prompt for one in asked], 2, number)), SamplingParams(4)
            )
            versions.append(responses[0].weight_version)
        result = train_step(parts, feed, 1e-3)
        seen.append((result.loss, result.grad_norm))
    return seen, versions
