"""One sample as the model gets it, or why it is refused: for the console, and with its views for a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.crops import CropPlan, num_image_tokens
from megatron_vl.data.decode import load_rgb, resize_whole, stretch_to_canvas
from megatron_vl.data.draw.shapes import Tile
from megatron_vl.data.draw.stream import Piece, token_pieces
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.lengths_build import index_builder
from megatron_vl.data.rows import PlannedImage, RowBuilder
from megatron_vl.data.turns import WHOLE, SplitRule
from megatron_vl.data.turns import Piece as Part
from megatron_vl.errors import ImageRefused

_MOST_RAW_BYTES = 2000


@dataclass(frozen=True)
class DrawnImage:
    """An image of a sample. problem: why its pixels cannot be used, "" when they can."""

    name: str
    plan: CropPlan
    tokens: int
    problem: str

    @property
    def summary(self) -> str:
        """`a.png  1920x1080, resized 1920x1080, canvas 2016x1008 cut by 504 into 2 x 4 crops, 836 tokens`."""
        plan = self.plan
        text = f"{self.name}  {_size(plan.size)}, resized {_size(plan.resized)}"
        if plan.canvas:
            text += f", canvas {_size(plan.canvas)} cut by {plan.window} into {plan.rows} x {plan.cols} crops"
        else:
            text += ", no crops"
        return f"{text}, {self.tokens} tokens" + (f"; REFUSED {self.problem}" if self.problem else "")


@dataclass(frozen=True)
class DrawnSample:
    """A sample. refused: why nothing of it is learnt; one that is only too long still has its pieces.

    raw: the beginning of its record as it stands in the data, shown where there are no pieces. cut_into: ids of the
    documents that a conversation which no row takes is trained on as (data.packing.overlong).
    """

    id: str
    place: str
    refused: BadSample | None
    pieces: tuple[Piece, ...]
    images: tuple[DrawnImage, ...]
    raw: str
    cut_into: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.id}  ({self.place})"

    @property
    def notes(self) -> list[str]:
        """What becomes of it, if it is not simply learnt from as it is."""
        notes = [f"REFUSED {self.refused.reason}: {self.refused.detail}"] if self.refused else []
        if self.cut_into:
            first, last = self.cut_into[0], self.cut_into[-1]
            notes.append(f"cut at turns into {len(self.cut_into)} documents, {first} to {last}")
        return notes

    @property
    def counts(self) -> str:
        """Tokens, scored ones and views in one line."""
        tokens = sum(piece.count for piece in self.pieces)
        scored = sum(piece.count for piece in self.pieces if piece.scored)
        crops = sum(image.plan.num_crops for image in self.images)
        return f"{tokens:,} tokens, {scored:,} scored; {len(self.images)} images with {crops} crops"


def describe_sample(
    raw: RawLine, domain: str, config: RunConfig, part: Part = WHOLE
) -> tuple[DrawnSample, Sequence[PlannedImage]]:
    """The sample, or a part of it, and its planned images, in order.

    Every image is decoded once, since headers do not show all.
    """
    builder = index_builder(config.data, config.model)
    row, planned = builder.build(raw, part)
    refused = row.refused
    cut_into = _cut_into(builder, raw, row.sample_id, config) if part == WHOLE and refused is None else ()
    if refused is None and not cut_into and len(row.ids) > config.data.seq_length:
        detail = f"{len(row.ids)} tokens, data.seq_length = {config.data.seq_length}"
        refused = BadSample(row.sample_id, raw.source, raw.line, "too_long", detail)
    vision = config.model.vision
    images = []
    for image in planned:
        problem = ""
        try:
            load_rgb(image.source, builder.images.decode_rule)
        except ImageRefused as refusal:
            problem = f"{refusal.reason}: {refusal.detail}"
            refused = refused or BadSample(
                image.sample_id, raw.source, raw.line, refusal.reason, refusal.detail
            )
        tokens = num_image_tokens(image.plan, vision.global_tokens, vision.crop_tokens)
        images.append(DrawnImage(image.name, image.plan, tokens, problem))
    pieces = token_pieces(row.ids, row.labels, config.model.tokens, builder.template.tokenizer)
    place = f"domain {domain}, {raw.source}:{raw.line}"
    text = raw.data[:_MOST_RAW_BYTES].decode("utf-8", "backslashreplace")
    return DrawnSample(row.sample_id, place, refused, tuple(pieces), tuple(images), text, cut_into), planned


def _cut_into(builder: RowBuilder, raw: RawLine, sample_id: str, config: RunConfig) -> tuple[str, ...]:
    """Ids of the pieces that the run makes of a sample, none when it stays whole."""
    rule = SplitRule.of(config.data.packing, config.data.seq_length)
    pieces = [] if rule is None else builder.pieces(raw, rule)
    return tuple(piece.name(sample_id) for piece in pieces if piece != WHOLE)


class Views:
    """The pictures of a sample's views, by tile. 8-bit pixels before normalising; a bad image is grey."""

    def __init__(self, planned: Sequence[PlannedImage], config: RunConfig):
        rule = index_builder(config.data, config.model).images.decode_rule
        self._planned, self._rule = planned, rule
        self._opened = lru_cache(maxsize=2)(self._open)

    def __call__(self, tile: Tile) -> Image.Image:
        resized, canvas = self._opened(tile.image)
        if tile.crop is None or canvas is None:
            return resized
        return canvas.crop(self._planned[tile.image].plan.box(tile.crop))

    def _open(self, number: int) -> tuple[Image.Image, Image.Image | None]:
        plan = self._planned[number].plan
        try:
            resized = resize_whole(load_rgb(self._planned[number].source, self._rule), plan)
        except ImageRefused:
            return Image.new("RGB", plan.resized, (128, 128, 128)), None
        return resized, stretch_to_canvas(resized, plan) if plan.canvas else None


def sample_lines(sample: DrawnSample) -> list[str]:
    """The sample for the console: one line per piece, scored ones marked."""
    lines = [sample.title, *sample.notes]
    lines += [f"image {number}: {image.summary}" for number, image in enumerate(sample.images)]
    if not sample.pieces:
        return [*lines, "", sample.raw]
    lines += [sample.counts, "", f"{'begin':>8}  {'tokens':>6}  scored  piece"]
    for piece in sample.pieces:
        text = repr(piece.text) if piece.kind == "text" else piece.text
        lines.append(f"{piece.begin:>8}  {piece.count:>6}  {'yes' if piece.scored else '-':<6}  {text}")
    return lines


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
