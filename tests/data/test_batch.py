"""Dense and packed micro-batches, shifting, masking, and the hard count of image slots."""

import numpy as np
import pytest
import torch

from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.batch import Row, check_image_slots, collate, empty_row, mask_documents, pack
from megatron_vl.data.template import NOT_SCORED
from megatron_vl.errors import DataError
from megatron_vl.plan.vision_share import CROP, GLOBAL

PAD = 99
BAD = BadSample("bad", "a.jsonl", 2, "missing", "x.png")


def row(name: str, length: int, scored_from: int, kinds: tuple[int, ...] = ()) -> Row:
    """ids length*100 + position, scored from a position on."""
    ids = np.arange(length, dtype=np.int64) + 100 * length
    return Row(name, ids, np.where(np.arange(length) >= scored_from, ids, NOT_SCORED), kinds)


def test_dense():
    batch = collate(
        [row("a", 4, 2, (CROP, GLOBAL)), empty_row("bad", BAD), row("c", 6, 0, (GLOBAL,))], 6, PAD, 112, 56
    )
    assert batch.input_ids.tolist() == [
        [400, 401, 402, 403, 99, 99],
        [99] * 6,
        [600, 601, 602, 603, 604, 605],
    ]
    n = NOT_SCORED
    assert batch.labels.tolist() == [[n, 402, 403, n, n, n], [n] * 6, [601, 602, 603, 604, 605, n]]
    assert batch.cu_seqlens is None and batch.doc_lengths == [4, 0, 6]
    assert batch.view_kinds == [CROP, GLOBAL, GLOBAL] and batch.view_documents == [0, 0, 2]
    assert batch.sample_ids == ["a", "bad", "c"] and batch.refused == [BAD] and batch.failed == []
    assert batch.crop_pixels.shape == (0, 3, 56, 56) and batch.global_pixels.shape == (0, 3, 112, 112)
    assert (batch.num_loss_tokens, batch.num_tokens, batch.num_images, batch.num_crops) == (7, 10, 2, 1)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_packed():
    documents = [row("a", 3, 0, (GLOBAL,)), empty_row("bad", BAD), row("b", 4, 2)]
    batch = pack(documents, 16, 4, PAD, 112, 56)
    n = NOT_SCORED
    assert batch.input_ids.tolist() == [[300, 301, 302, 99, 400, 401, 402, 403] + [99] * 8]
    assert batch.labels.tolist() == [[301, 302, n, n, n, 402, 403, n] + [n] * 8]
    assert batch.cu_seqlens == [0, 4, 8, 16] and batch.doc_lengths == [3, 4, 0]
    assert batch.sample_ids == ["a", "b", ""] and batch.refused == [BAD] and batch.view_documents == [0]
    full = pack([row("a", 8, 0), row("b", 8, 0)], 16, 8, PAD)
    assert full.cu_seqlens == [0, 8, 16] and full.doc_lengths == [8, 8]


def test_dense_and_packed_score_the_same():
    rows = [row("a", 5, 1), row("b", 7, 3)]
    dense, packed = collate(rows, 8, PAD), pack(rows, 32, 8, PAD)
    assert dense.num_loss_tokens == packed.num_loss_tokens == 4 + 4
    assert packed.input_ids[0, :16].tolist() == dense.input_ids.flatten().tolist()
    assert packed.labels[0, :16].tolist() == dense.labels.flatten().tolist()


def test_masking_a_document():
    rows = [row("a", 4, 0), row("b", 4, 0)]
    dense = collate(rows, 4, PAD)
    masked = mask_documents(dense, [1])
    assert masked.labels.tolist() == [[401, 402, 403, NOT_SCORED], [NOT_SCORED] * 4]
    assert torch.equal(masked.input_ids, dense.input_ids) and dense.num_loss_tokens == 6
    packed = mask_documents(pack(rows, 16, 4, PAD), [0])
    assert packed.labels[0].tolist() == [NOT_SCORED] * 4 + [401, 402, 403] + [NOT_SCORED] * 9


def test_fingerprint():
    one, same, other = (collate([row("a", 4, scored)], 4, PAD) for scored in (0, 0, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_too_long_for_the_row():
    with pytest.raises(DataError, match="sample a has 5 tokens, more than seq_length = 4"):
        collate([row("a", 5, 0)], 4, PAD)
    with pytest.raises(DataError, match="2 documents need 16 tokens when padded to multiples of 8"):
        pack([row("a", 5, 0), row("b", 3, 0)], 8, 8, PAD)
    with pytest.raises(DataError, match="seq_length = 10 must be a multiple of 4"):
        pack([row("a", 5, 0)], 10, 4, PAD)


def test_image_slots_must_match():
    ids = np.array([1, 7, 7, 2])
    check_image_slots(Row("a", ids, ids, (CROP, CROP)), im_patch=7, global_tokens=4, crop_tokens=1)
    with pytest.raises(DataError, match="sample a: 2 <im_patch> ids, but its 1 views make 4 features"):
        check_image_slots(Row("a", ids, ids, (GLOBAL,)), im_patch=7, global_tokens=4, crop_tokens=1)
