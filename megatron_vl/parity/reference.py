"""A reference file (format: golden/README.md) as documents with pixels, and as micro-batches of a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megatron_vl.config.model import ModelConfig
from megatron_vl.data.batch import MicroBatch, Row, collate, empty_row, pack
from megatron_vl.errors import CheckpointError
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.sequence import row_multiple
from megatron_vl.plan.shares import views_of_rank
from megatron_vl.plan.vision_share import CROP, GLOBAL

PIXEL_SCALE = 32.0


@dataclass(frozen=True)
class Reference:
    """tensors: everything in the file, float32 or integer. samples: number of samples."""

    tensors: dict[str, torch.Tensor]
    samples: int

    def names(self, prefix: str) -> list[str]:
        """Names below ``prefix`` with the prefix taken off."""
        return [n[len(prefix) :] for n in self.tensors if n.startswith(prefix)]


def read_reference(path: str | Path) -> Reference:
    """Read the file.

    Raises:
        CheckpointError: not a safetensors file, or without the inputs that the format asks for.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    samples = 0
    while f"inputs.sample{samples}.input_ids" in tensors:
        samples += 1
    wanted = ["inputs.images_per_sample", "outputs.loss"]
    if "inputs.images_per_sample" in tensors and tensors["inputs.images_per_sample"].sum() > 0:
        wanted += ["inputs.num_crops", "inputs.global_pixels_times_32"]
        if "inputs.num_crops" in tensors and tensors["inputs.num_crops"].sum() > 0:
            wanted.append("inputs.crop_pixels_times_32")
    wanted += [
        f"inputs.sample{i}.{name}" for i in range(max(samples, 1)) for name in ("input_ids", "targets")
    ]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{path}: not a reference file (golden/README.md), missing {', '.join(missing)}"
        )
    return Reference(tensors, samples)


@dataclass(frozen=True)
class Document:
    """One sample: ids, targets (already shifted), and its views with pixels in stream order."""

    number: int
    ids: np.ndarray
    targets: np.ndarray
    kinds: list[int]
    pixels: list[torch.Tensor]


def documents(reference: Reference, model: ModelConfig) -> list[Document]:
    """The samples of the file, images shared out by ``images_per_sample``.

    Raises:
        CheckpointError: pixels that are not as many, or not as large, as the counts and the model say.
    """
    t = reference.tensors
    nothing = torch.zeros(0, dtype=torch.int64)
    crops_of, images_of = t.get("inputs.num_crops", nothing).tolist(), t["inputs.images_per_sample"].tolist()
    vision = model.vision
    crops = _pixels(t, "crop", int(sum(crops_of)), vision.crop_size)
    whole = _pixels(t, "global", int(sum(images_of)), vision.image_size)
    if len(images_of) != reference.samples or len(crops_of) != len(whole):
        raise CheckpointError(
            f"inputs.images_per_sample has {len(images_of)} entries for {reference.samples} samples and "
            f"inputs.num_crops {len(crops_of)} for {len(whole)} images; write the reference file again"
        )
    found, image, crop = [], 0, 0
    for i in range(reference.samples):
        kinds, pixels = [], []
        for _ in range(int(images_of[i])):
            count = int(crops_of[image])
            kinds += [CROP] * count + [GLOBAL]
            pixels += [*crops[crop : crop + count], whole[image]]
            image, crop = image + 1, crop + count
        ids, targets = (t[f"inputs.sample{i}.{n}"].numpy().astype(np.int64) for n in ("input_ids", "targets"))
        found.append(Document(i, ids, targets, kinds, pixels))
    return found


def _pixels(tensors: dict[str, torch.Tensor], kind: str, count: int, side: int) -> torch.Tensor:
    """float32 ``[count, 3, side, side]``."""
    if count == 0:
        return torch.zeros(0, 3, side, side)
    name, wanted = f"inputs.{kind}_pixels_times_32", (count, 3, side, side)
    if tuple(tensors[name].shape) != wanted:
        raise CheckpointError(
            f"{name} is {list(tensors[name].shape)}, but its counts and config.json say {list(wanted)}; use the "
            "reference of this checkpoint"
        )
    return tensors[name].float() / PIXEL_SCALE


@dataclass(frozen=True)
class Placed:
    """Where a sample went: data-parallel rank, micro-batch, row, first token, and its first view there."""

    number: int
    dp: int
    micro_batch: int
    row: int
    start: int
    first_view: int
    length: int


@dataclass(frozen=True)
class Batches:
    """rows[dp][micro_batch]: documents of the row(s). seq_length: one for all. placed: where each sample is."""

    rows: list[list[list[list[Document]]]]
    seq_length: int
    packed: bool
    placed: list[Placed]


def arrange(docs: Sequence[Document], layout: Layout, packed: bool, per_packed_row: int = 2) -> Batches:
    """Spread the samples over data-parallel ranks and micro-batches.

    Dense: one sample per row. Packed: ``per_packed_row`` samples. What does not fill the layout (DP ranks, or the
    micro-batches that the interleaved schedule wants) is completed by fully masked rows.
    """
    multiple = row_multiple(layout.tp, layout.cp, layout.sp)
    per_row = per_packed_row if packed else 1
    groups = [list(docs[i : i + per_row]) for i in range(0, len(docs), per_row)]
    rounds = -(-len(groups) // layout.dp)
    if layout.vpp > 1:
        rounds = -(-rounds // layout.pp) * layout.pp
    groups += [[] for _ in range(layout.dp * rounds - len(groups))]
    rows = [[[groups[m * layout.dp + d]] for m in range(rounds)] for d in range(layout.dp)]

    def padded(length: int) -> int:
        return -(-length // multiple) * multiple

    seq_length = max(sum(padded(len(d.ids)) for d in group) for group in groups)
    if packed:  # room for filler behind the last document: real rows are rarely full
        seq_length += multiple
    placed = []
    for d in range(layout.dp):
        for m in range(rounds):
            start = views = 0
            for doc in rows[d][m][0]:
                placed.append(Placed(doc.number, d, m, 0, start, views, len(doc.ids)))
                start += padded(len(doc.ids))
                views += len(doc.kinds)
    return Batches(rows, seq_length, packed, placed)


def micro_batches(batches: Batches, model: ModelConfig, layout: Layout, rank: int) -> list[MicroBatch]:
    """What ``rank`` is fed: whole rows, and the pixels of its own share of the views."""
    coords, padding = layout.coords(rank), padding_id(model)
    made, of_rows = [], []
    for groups in batches.rows[coords.dp]:
        docs = [doc for group in groups for doc in group]
        rows = [_row(doc) for doc in docs] or [empty_row("")]
        sizes = (model.vision.image_size, model.vision.crop_size)
        if batches.packed:
            multiple = row_multiple(layout.tp, layout.cp, layout.sp)
            batch = pack(rows, batches.seq_length, multiple, padding, *sizes)
        else:
            batch = collate(rows, batches.seq_length, padding, *sizes)
        made.append(batch)
        of_rows.append(docs)
    shares = views_of_rank(model, layout, coords, [batch.view_kinds for batch in made])
    return [_with_pixels(*one) for one in zip(made, of_rows, shares)]


def padding_id(model: ModelConfig) -> int:
    """What rows are filled up with: ``<|endoftext|>``, or any text id where a small vocabulary leaves it out."""
    known = model.tokens.endoftext
    return known if known < model.text.vocab_size else int(model.tokens.im_patch == 0)


def _row(doc: Document) -> Row:
    # Row wants unshifted labels: put each target back behind its position
    labels = np.concatenate([[-100], doc.targets[:-1]])
    return Row(f"sample{doc.number}", doc.ids, labels, tuple(doc.kinds))


def _with_pixels(batch: MicroBatch, docs: Sequence[Document], mine: Sequence[int]) -> MicroBatch:
    """mine: the views of a rank's share."""
    pixels = [p for doc in docs for p in doc.pixels]
    crops = [pixels[v] for v in mine if batch.view_kinds[v] == CROP]
    whole = [pixels[v] for v in mine if batch.view_kinds[v] == GLOBAL]
    return replace(
        batch,
        crop_pixels=torch.stack(crops) if crops else batch.crop_pixels,
        global_pixels=torch.stack(whole) if whole else batch.global_pixels,
    )
