"""Batches made up of random tokens and pixels, in the shape that a run would see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.batch import MicroBatch, Row, collate, pack
from megatron_vl.errors import ConfigError
from megatron_vl.plan.budget import num_microbatches
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.search import IMAGE_CROPS
from megatron_vl.plan.sequence import row_multiple
from megatron_vl.plan.shares import views_of_rank
from megatron_vl.plan.vision_share import CROP, GLOBAL

SHARE = 0.3  # of a multimodal domain's tokens that are visual: the planner's default
DOCUMENT_TOKENS = 1024  # of packed rows


@dataclass(frozen=True)
class Shape:
    """documents: true lengths of a row's documents. images: how many of them each document has; an image is a global
    view and ``IMAGE_CROPS`` crops. Every token that is not visual is scored."""

    documents: tuple[int, ...]
    images: tuple[int, ...]
    why: str

    def describe(self, model: ModelConfig) -> str:
        """One line for a report."""
        tokens = sum(self.images) * image_tokens(model)
        return (
            f"synthetic rows ({self.why}): {len(self.documents)} documents of {min(self.documents):,} to "
            f"{max(self.documents):,} tokens, {sum(self.images)} images of 1 + {IMAGE_CROPS} views, "
            f"{tokens / sum(self.documents):.1%} of the tokens visual; random words, random pixels"
        )


def image_tokens(model: ModelConfig) -> int:
    """Decoder tokens of one image of the made-up kind."""
    return IMAGE_CROPS * model.vision.crop_tokens + model.vision.global_tokens


def shape_of(
    config: RunConfig, layout: Layout, visual_share: float | None = None, document_tokens: int | None = None
) -> Shape:
    """What a row looks like.

    visual_share: part of the tokens that is visual; None = 30% of what the first phase of the mixture leaves to
    multimodal data (all, where it has no ``text_share``). document_tokens: length of the documents of packed rows.
    Raises ConfigError for a share that no whole number of images gives.
    """
    text_share = config.data.mixture[0].text_share if config.data.mixture else None
    why = "as asked for"
    if visual_share is None:
        visual_share = SHARE * (1.0 - (text_share or 0.0))
        why = f"{SHARE:.0%} visual" + (f", text_share {text_share}" if text_share else "")
    if not 0 <= visual_share < 1:
        raise ConfigError(f"visual share = {visual_share}: must be at least 0 and below 1")
    length, packing = config.data.seq_length, config.data.packing.enabled
    multiple = row_multiple(layout.tp, layout.cp, layout.sp)
    each = length if not packing else min(document_tokens or DOCUMENT_TOKENS, length)
    each = each // multiple * multiple
    documents = [each] * (length // each) if packing else [length]
    if packing and length - sum(documents) >= multiple:
        documents.append((length - sum(documents)) // multiple * multiple)
    size = image_tokens(config.model)
    wanted = max(1, round(visual_share * length / size)) if visual_share else 0
    room = [max(0, (tokens - 1) // size) for tokens in documents]
    if wanted and not sum(room):
        raise ConfigError(
            f"synthetic data: an image of {size} tokens does not fit a document of {max(documents)}; raise "
            "data.seq_length or --document-tokens, or use --visual-share 0"
        )
    images = [0] * len(documents)
    for number in range(min(wanted, sum(room))):
        free = [i for i in range(len(documents)) if images[i] < room[i]]
        images[min(free, key=lambda i: (images[i], (i + number) % len(documents)))] += 1
    return Shape(tuple(documents), tuple(images), why)


def micro_batches(config: RunConfig, layout: Layout, rank: int, shape: Shape) -> list[MicroBatch]:
    """What ``rank`` would be handed for one step, pixels of its own share of the views included."""
    coords = layout.coords(rank)
    count = num_microbatches(config.train, layout.dp)
    numbers = range(coords.dp * count, (coords.dp + 1) * count)
    made = [_micro_batch(config, layout, shape, number) for number in numbers]
    shares = views_of_rank(config.model, layout, coords, [batch.view_kinds for batch in made])
    return [_with_pixels(config, *one) for one in zip(made, shares, numbers)]


def _micro_batch(config: RunConfig, layout: Layout, shape: Shape, number: int) -> MicroBatch:
    """One without pixels."""
    data, model, rows = config.data, config.model, config.train.micro_batch_size
    random = np.random.default_rng((data.seed, number))
    sizes = (model.vision.image_size, model.vision.crop_size)
    padding = min(model.tokens.endoftext, model.text.vocab_size - 1)
    documents = [
        _document(model, length, images, random)
        for _ in range(1 if data.packing.enabled else rows)
        for length, images in zip(shape.documents, shape.images)
    ]
    if data.packing.enabled:
        multiple = row_multiple(layout.tp, layout.cp, layout.sp)
        return pack(documents, data.seq_length, multiple, padding, *sizes)
    return collate(documents, data.seq_length, padding, *sizes)


def _with_pixels(config: RunConfig, batch: MicroBatch, mine: Sequence[int], number: int) -> MicroBatch:
    """mine: the views of this rank."""
    data, vision = config.data, config.model.vision
    pixels: dict[int, list[torch.Tensor]] = {CROP: [], GLOBAL: []}
    for view in mine:
        kind = batch.view_kinds[view]
        side = vision.crop_size if kind == CROP else vision.image_size
        pixels[kind].append(_pixels(side, (data.seed, number, view), data.image_mode))
    return replace(
        batch,
        crop_pixels=torch.stack(pixels[CROP]) if pixels[CROP] else batch.crop_pixels,
        global_pixels=torch.stack(pixels[GLOBAL]) if pixels[GLOBAL] else batch.global_pixels,
    )


def _document(model: ModelConfig, length: int, images: int, random: np.random.Generator) -> Row:
    """Images first, then words."""
    slot = model.tokens.im_patch
    words = random.integers(0, model.text.vocab_size - 1, length)
    words += words >= slot  # any word but the slot
    visual = images * image_tokens(model)
    words[:visual] = slot
    labels = words.copy()
    labels[:visual] = -100
    return Row("synthetic", words, labels, tuple([*[CROP] * IMAGE_CROPS, GLOBAL] * images))


def _pixels(side: int, seed: tuple[int, ...], mode: str) -> torch.Tensor:
    """One view; the same on every rank that encodes it."""
    random = np.random.default_rng(seed)
    if mode == "fast":
        return torch.from_numpy(random.integers(0, 256, (3, side, side), dtype=np.uint8))
    return torch.from_numpy(random.standard_normal((3, side, side), dtype=np.float32))
