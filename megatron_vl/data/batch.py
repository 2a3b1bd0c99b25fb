"""Documents joined into a micro-batch: dense (one per row) or packed (several in one row).

A refused sample keeps its place as a document without ids, images and loss, so that one bad file never
changes which samples the others meet.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.template import NOT_SCORED, shift_labels
from megatron_vl.errors import DataError
from megatron_vl.plan.vision_share import CROP, GLOBAL


@dataclass(frozen=True)
class Row:
    """One document before collation.

    ids, labels: int64 [n], labels not shifted. view_kinds: CROP or GLOBAL per view in token-stream order.
    refused: why the document is empty, None for a good one and for filler. left_out: reasons of the images that a
    page goes without.
    """

    sample_id: str
    ids: np.ndarray
    labels: np.ndarray
    view_kinds: tuple[int, ...] = ()
    refused: BadSample | None = None
    left_out: tuple[str, ...] = ()


def empty_row(sample_id: str, refused: BadSample | None = None) -> Row:
    """A document that nothing is learnt from: a refused sample, or filler where there are too few samples."""
    nothing = np.empty(0, dtype=np.int64)
    return Row(sample_id, nothing, nothing, refused=refused)


@dataclass(frozen=True)
class FailedView:
    """An image whose pixels could not be decoded on this rank. document: its number in the micro-batch."""

    document: int
    record: BadSample


@dataclass
class MicroBatch:
    """What one forward pass of one model replica consumes: b rows of S tokens, D documents (dense: D = b).

    input_ids: int64 [b, S]. labels: int64 [b, S], shifted: labels[:, t] is what position t must predict;
        -100 = not scored.
    cu_seqlens: None = dense, each row one document; else packed: b = 1, padded boundaries of the D documents,
        from 0 to S. doc_lengths: D true lengths; 0 = nothing in it. sample_ids: D ids, "" for filler.
    view_kinds: kind of each of the V views in token-stream order. view_documents: V document numbers.
    crop_pixels [c, 3, C, C], global_pixels [g, 3, G, G]: on CPU, float32 and normalised (data.image_mode exact)
        or uint8 and not (fast: the model normalises them), only this vision rank's share
        (`share_views(view_kinds, vision_size, costs)[vision_rank]`), in that order; no views on ranks without the
        tower.
    refused: samples refused before decoding, the same on all ranks of a replica.
    failed: images refused while decoding, known only to the rank that decoded them. Their pixels are zeros:
        every rank of the replica must be told and call `mask_documents` before the forward pass.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: list[int] | None
    doc_lengths: list[int]
    view_kinds: list[int]
    crop_pixels: torch.Tensor
    global_pixels: torch.Tensor
    sample_ids: list[str]
    view_documents: list[int] = field(default_factory=list)
    refused: list[BadSample] = field(default_factory=list)
    failed: list[FailedView] = field(default_factory=list)

    @property
    def num_loss_tokens(self) -> int:
        """Positions that are scored."""
        return int((self.labels != NOT_SCORED).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.doc_lengths)

    @property
    def num_images(self) -> int:
        return self.view_kinds.count(GLOBAL)

    @property
    def num_crops(self) -> int:
        return self.view_kinds.count(CROP)

    def fingerprint(self) -> int:
        """32 bits over ids, labels and views: ranks of a replica that differ have read different data."""
        value = zlib.crc32(self.input_ids.numpy().tobytes())
        value = zlib.crc32(self.labels.numpy().tobytes(), value)
        return zlib.crc32(bytes(self.view_kinds), value)


def collate(
    rows: Sequence[Row], seq_length: int, padding_id: int, global_size: int = 728, crop_size: int = 504
) -> MicroBatch:
    """Dense micro-batch [b, seq_length] without pixels: each document padded with padding_id, labels -100.

    Raises DataError for a row that is longer: whoever makes rows refuses those before.
    """
    ids = np.full((len(rows), seq_length), padding_id, dtype=np.int64)
    labels = np.full((len(rows), seq_length), NOT_SCORED, dtype=np.int64)
    for number, row in enumerate(rows):
        length = len(row.ids)
        if length > seq_length:
            raise DataError(
                f"sample {row.sample_id} has {length} tokens, more than seq_length = {seq_length}"
            )
        ids[number, :length] = row.ids
        labels[number, :length] = shift_labels(row.labels)
    return _micro_batch(rows, ids, labels, None, global_size, crop_size)


def pack(
    documents: Sequence[Row],
    seq_length: int,
    multiple: int,
    padding_id: int,
    global_size: int = 728,
    crop_size: int = 504,
) -> MicroBatch:
    """Packed micro-batch [1, seq_length] without pixels.

    Each document is padded to a multiple of `multiple` (`plan.sequence.row_multiple`); what is left of the
    row is a masked document of its own, so that no real token attends to filler. Targets never cross a
    document boundary. Raises DataError when seq_length is no multiple or the documents do not fit.
    """
    if seq_length % multiple:
        raise DataError(
            f"seq_length = {seq_length} must be a multiple of {multiple} (context and sequence parallelism)"
        )
    padded = [-(-len(document.ids) // multiple) * multiple for document in documents]
    if sum(padded) > seq_length:
        raise DataError(
            f"{len(documents)} documents need {sum(padded)} tokens when padded to multiples of {multiple}, "
            f"more than seq_length = {seq_length}"
        )
    # A refused sample has no tokens and so no place in the row; its record is kept.
    rows = [document for document in documents if len(document.ids)]
    ids = np.full((1, seq_length), padding_id, dtype=np.int64)
    labels = np.full((1, seq_length), NOT_SCORED, dtype=np.int64)
    cu_seqlens = [0]
    for row in rows:
        start, length = cu_seqlens[-1], len(row.ids)
        ids[0, start : start + length] = row.ids
        labels[0, start : start + length] = shift_labels(row.labels)
        cu_seqlens.append(start + -(-length // multiple) * multiple)
    if cu_seqlens[-1] < seq_length:
        rows.append(empty_row(""))
        cu_seqlens.append(seq_length)
    batch = _micro_batch(rows, ids, labels, cu_seqlens, global_size, crop_size)
    return replace(batch, refused=[document.refused for document in documents if document.refused])


def mask_documents(batch: MicroBatch, documents: Iterable[int]) -> MicroBatch:
    """Takes documents out of the loss; to be called alike on all ranks of a replica.

    Ids and views stay, so that the sharing of views and the shape of every exchange are unchanged: the failed
    image is still encoded, as zeros. Nothing of it is learnt from: attention stays inside the document, none
    of whose tokens is scored any more, so every gradient that passes through the image is exactly zero.
    """
    labels = batch.labels.clone()
    for document in documents:
        if batch.cu_seqlens is None:
            labels[document] = NOT_SCORED
        else:
            labels[0, batch.cu_seqlens[document] : batch.cu_seqlens[document + 1]] = NOT_SCORED
    return replace(batch, labels=labels)


def check_image_slots(row: Row, im_patch: int, global_tokens: int, crop_tokens: int) -> None:
    """Raises DataError when a row's <im_patch> ids are not as many as the features that its views make."""
    slots = int(np.count_nonzero(row.ids == im_patch))
    tokens = {CROP: crop_tokens, GLOBAL: global_tokens}
    features = sum(tokens[kind] for kind in row.view_kinds)
    if slots != features:
        raise DataError(
            f"sample {row.sample_id}: {slots} <im_patch> ids, but its {len(row.view_kinds)} views make "
            f"{features} features"
        )


def _micro_batch(
    rows: Sequence[Row],
    ids: np.ndarray,
    labels: np.ndarray,
    cu_seqlens: list[int] | None,
    global_size: int,
    crop_size: int,
) -> MicroBatch:
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        cu_seqlens=cu_seqlens,
        doc_lengths=[len(row.ids) for row in rows],
        view_kinds=[kind for row in rows for kind in row.view_kinds],
        crop_pixels=torch.empty(0, 3, crop_size, crop_size),
        global_pixels=torch.empty(0, 3, global_size, global_size),
        sample_ids=[row.sample_id for row in rows],
        view_documents=[number for number, row in enumerate(rows) for _ in row.view_kinds],
        refused=[row.refused for row in rows if row.refused is not None],
    )
