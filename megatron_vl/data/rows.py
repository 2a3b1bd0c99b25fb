"""From a line of JSONL to a row of ids with planned images, and from planned images to one rank's pixels.

Building a row reads image headers only, so every rank of a model replica builds the same rows at little cost;
pixels are decoded by the ranks that encode them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.bad_samples import BadSample, SampleRefused
from megatron_vl.data.batch import FailedView, MicroBatch, Row, check_image_slots, empty_row
from megatron_vl.data.crops import CropPlan
from megatron_vl.data.image_backend import image_backend
from megatron_vl.data.image_checks import ImageSource, resolve_under
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.html_page import PageSample
from megatron_vl.data.sources.locator import LocatedImage
from megatron_vl.data.sources.record import TokenSample
from megatron_vl.data.template import Template
from megatron_vl.data.tokenizer import load_tokenizer
from megatron_vl.data.turns import WHOLE, Piece, SplitRule, cut, images_per_message
from megatron_vl.errors import ImageRefused
from megatron_vl.plan.vision_share import CROP, GLOBAL


@dataclass(frozen=True)
class PlannedImage:
    """One image of a row: the file and its views. sample_id, source, line: in case that decoding fails."""

    name: str
    source: ImageSource
    plan: CropPlan
    sample_id: str
    file: str
    line: int


class RowBuilder:
    """Turns raw lines into rows under the rules of a run. Never raises for a bad sample: its row is empty."""

    def __init__(self, data: DataConfig, model: ModelConfig):
        tokenizer = load_tokenizer(data.tokenizer, model.tokens, model.text.vocab_size)
        self.data = data
        self.model = model
        self.template = Template(tokenizer, model.tokens, model.vision, data.loss_on)
        self.images = image_backend(data, model)

    def build(self, raw: RawLine, piece: Piece = WHOLE) -> tuple[Row, list[PlannedImage]]:
        """The row of one line and its images in order; a refused line gives an empty row with the reason.

        piece: the part of a conversation that is meant (`data/turns.py`).
        Reasons: those of `parse_sample`, of the image headers (`image_checks.REASONS`), of the template, and
        too_long. A web page goes without images that cannot be used, as long as they are not too many. Raises
        DataError when ids and views of a good sample disagree, which is an error of ours.
        """
        sample_id, failed = raw.default_id, {}
        try:
            sample = raw.parse()
            sample_id = sample.id
            if piece.number:
                sample = piece.of(sample)
                sample_id = sample.id
            if isinstance(sample, TokenSample):
                if len(sample.ids) < 2:
                    raise SampleRefused("no_loss_tokens", f"{len(sample.ids)} token: none has a next one")
                images, ids, labels = [], sample.ids, sample.ids
            else:
                images, failed = self._plan_images(sample, raw)
                if failed:
                    sample = self._without(sample, failed)
                ids, labels = self.template.render(sample, [image.plan for image in images])
            if len(ids) > self.data.seq_length:
                raise SampleRefused(
                    "too_long", f"{len(ids)} tokens, data.seq_length = {self.data.seq_length}"
                )
        except SampleRefused as refusal:
            bad = BadSample(
                refusal.sample_id or sample_id, raw.source, raw.line, refusal.reason, refusal.detail
            )
            return empty_row(bad.id, bad), []
        kinds = tuple(kind for image in images for kind in image.plan.view_kinds)
        left_out = tuple(refusal.reason for refusal in failed.values())
        row = Row(sample_id, ids, labels, kinds, left_out=left_out)
        vision = self.model.vision
        check_image_slots(row, self.model.tokens.im_patch, vision.global_tokens, vision.crop_tokens)
        return row, images

    def pieces(self, raw: RawLine, rule: SplitRule) -> list[Piece]:
        """How the conversation of a line is cut under a rule; [WHOLE] for anything that is not, or is refused."""
        try:
            sample = raw.parse()
            if isinstance(sample, TokenSample) or not sample.messages:
                return [WHOLE]
            images, failed = self._plan_images(sample, raw)
            if failed:
                return [WHOLE]
            plans = [image.plan for image in images]
            costs = np.zeros((len(sample.messages), 3), dtype=np.int64)
            costs[:, 0] = self.template.turn_tokens(sample, plans)
        except SampleRefused:
            return [WHOLE]
        for number, count in enumerate(images_per_message(sample)):
            mine, plans = plans[:count], plans[count:]
            kinds = [kind for plan in mine for kind in plan.view_kinds]
            costs[number, 1:] = kinds.count(GLOBAL), kinds.count(CROP)
        return cut(sample.messages, costs, rule)

    def _plan_images(
        self, sample: Sample, raw: RawLine
    ) -> tuple[list[PlannedImage], dict[int, ImageRefused]]:
        """The usable images of a sample, and why the others, by number, are not."""
        planned, failed = [], {}
        for number, image in enumerate(sample.images):
            try:
                located = isinstance(image, LocatedImage)
                source = image.bytes_at if located else resolve_under(self.data.data_root, image.path)
                plan = self.images.plan(self.images.header(source).size)
            except ImageRefused as refusal:
                failed[number] = refusal
                if not isinstance(sample, PageSample):
                    break
                continue
            planned.append(PlannedImage(image.path, source, plan, sample.id, raw.source, raw.line))
        return planned, failed

    def _without(self, sample: Sample, failed: dict[int, ImageRefused]) -> Sample:
        """A page may go without some of its images; whatever else asks about an image makes no sense without it."""
        detail = {number: _named(sample.images[number].path, refusal) for number, refusal in failed.items()}
        if not isinstance(sample, PageSample):
            (number, refusal) = next(iter(failed.items()))
            raise SampleRefused(refusal.reason, detail[number]) from refusal
        return sample.without_images({n: (refusal.reason, detail[n]) for n, refusal in failed.items()})

    def with_pixels(
        self, batch: MicroBatch, images: Sequence[Sequence[PlannedImage]], share: Sequence[int]
    ) -> MicroBatch:
        """The micro-batch with the pixels of the views in `share`, crops first, then globals, each ascending.

        images: per document of the batch. An image that cannot be decoded gives zeros and an entry in
        `failed`. The pixels are of `self.images.dtype`, also where the share is empty.
        """
        wanted = set(share)
        crops, globals_, failed = [], [], []
        first_view = 0
        for document, document_images in enumerate(images):
            for image in document_images:
                global_view = first_view + image.plan.num_crops
                my_crops = [view - first_view for view in range(first_view, global_view) if view in wanted]
                if my_crops or global_view in wanted:
                    pixels, refusal = self._decode(image, my_crops, global_view in wanted)
                    globals_.append(pixels[0])
                    crops.append(pixels[1])
                    if refusal is not None:
                        failed.append(FailedView(document, _record(image, refusal)))
                first_view = global_view + 1
        assert first_view == len(batch.view_kinds), (
            f"{first_view} planned views, {len(batch.view_kinds)} in the batch"
        )
        dtype = self.images.dtype
        return replace(
            batch,
            crop_pixels=_joined(crops, batch.crop_pixels.to(dtype)),
            global_pixels=_joined(globals_, batch.global_pixels.to(dtype)),
            failed=failed,
        )

    def _decode(
        self, image: PlannedImage, crops: list[int], with_global: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ImageRefused | None]:
        """(global [0 or 1, 3, G, G], crops [n, 3, C, C]) and why they are zeros, if they are."""
        try:
            return self.images.views(image.source, image.plan, crops=crops, with_global=with_global), None
        except ImageRefused as refusal:
            return self.images.zeros(len(crops), with_global), refusal


def _joined(views: list[torch.Tensor], none: torch.Tensor) -> torch.Tensor:
    """One tensor of all views. An empty one in the list would make torch rearrange channels-last bytes."""
    filled = [tensor for tensor in views if len(tensor)]
    if not filled:
        return none
    return filled[0] if len(filled) == 1 else torch.cat(filled)


def _record(image: PlannedImage, refusal: ImageRefused) -> BadSample:
    detail = _named(image.name, refusal)
    return BadSample(image.sample_id, image.file, image.line, refusal.reason, detail)


def _named(path: str, refusal: ImageRefused) -> str:
    shown = path if len(path) <= 120 else path[:117] + "..."
    return refusal.detail if shown in refusal.detail else f"{shown}: {refusal.detail}"
