"""Pre-tokenised text: the same ids as megatron-core wrote, foreign ids refused, damaged pairs named."""

import struct

import numpy as np
import pytest
import torch

from megatron_vl.data.sources.megatron_bin import MegatronSource, TokenRule
from megatron_vl.data.sources.open import open_source
from megatron_vl.data.sources.survey import survey
from megatron_vl.errors import ConfigError, DataError
from tests.data.sources.making import megatron_pair, reason_of, reasons
from tests.data.tiny import MODEL

RULE = TokenRule(100, (90, 91))
HEAD = 34


def test_documents_written_by_megatron_core(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    documents = [[[1, 2, 3], [4]], [[5]], [[7, 8], [], [9]]]
    for dtype in (np.uint16, np.int32, np.int64):
        prefix = str(tmp_path / dtype.__name__)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in documents:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        source = open_source(f"{prefix}.idx", token_rule=RULE)
        assert [source[n].parse().ids.tolist() for n in range(3)] == [[1, 2, 3, 4], [5], [7, 8, 9]]
        assert source[0].parse().ids.dtype == np.int64
        theirs = IndexedDataset(prefix)
        assert np.concatenate([theirs[n] for n in range(2)]).tolist() == source[0].parse().ids.tolist()
    assert source[2].default_id == "int64.bin:3" and source[2].parse().id == "int64.bin:3"


def test_foreign_ids_are_refused_and_counted(tmp_path):
    documents = [[1, 99], [1, 100], [-1], [89, 90], [92], []]
    source = open_source(megatron_pair(tmp_path, documents), token_rule=RULE)
    expected = [
        "",
        "id_outside_vocabulary",
        "id_outside_vocabulary",
        "image_id_in_text",
        "",
        "empty_document",
    ]
    assert reasons(source) == expected
    found = survey(source)
    assert found.kept == 2 and found.tokens == 3 and found.refused.total() == 4
    assert "image_id_in_text 1" in str(found)


def test_the_rule_of_a_model(tmp_path):
    rule = TokenRule.for_model(MODEL)
    tokens = MODEL.tokens
    documents = [
        [tokens.im_patch],
        [tokens.im_start],
        [tokens.patch_newline],
        [tokens.endoftext],
        [tokens.chat_end],
    ]
    source = open_source(megatron_pair(tmp_path, documents, code=5), token_rule=rule)
    assert reasons(source) == ["image_id_in_text"] * 3 + ["", ""]
    assert rule.vocab_size == MODEL.text.vocab_size


def test_pairs_by_any_of_their_names(tmp_path):
    megatron_pair(tmp_path, [[1], [2]], name="a")
    megatron_pair(tmp_path, [[3]], name="b")
    a = str(tmp_path / "a")
    for paths, count in (
        ([a], 2),
        ([f"{a}.bin", f"{a}.idx"], 2),
        ([tmp_path], 3),
        ([f"{a}.idx", tmp_path / "b.bin"], 3),
    ):
        assert len(open_source(paths, "megatron", token_rule=RULE)) == count
    assert open_source(tmp_path, token_rule=RULE).describe() == [
        {"path": f"{a}.bin", "bytes": 8, "samples": 2},
        {"path": f"{a}.idx", "bytes": 82, "samples": 0},
        {"path": str(tmp_path / "b.bin"), "bytes": 4, "samples": 1},
        {"path": str(tmp_path / "b.idx"), "bytes": 62, "samples": 0},
    ]
    with pytest.raises(ConfigError, match="format = megatron needs token_rule"):
        open_source(f"{a}.bin")


def spoil(path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"NOTMEGATR", "no Megatron index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "numbers of type float32"),
        (17, b"\x63", "numbers of type 99"),
        (17, b"\x05", "it is truncated or belongs to another .idx"),
        (18, struct.pack("<Q", 1 << 62), "it is truncated or damaged"),
        (26, struct.pack("<Q", 3), "it is truncated or damaged"),
        (HEAD, struct.pack("<i", -1), "it is truncated or belongs"),
        (HEAD, struct.pack("<i", 1 << 30), "it is truncated or belongs"),
        (HEAD + 12, struct.pack("<q", -8), "it is truncated or belongs"),
        (HEAD + 12, struct.pack("<q", (1 << 63) - 1), "it is truncated or belongs"),
        (HEAD + 36, struct.pack("<q", 1), "document borders do not go from 0"),
        (HEAD + 44, struct.pack("<q", 9), "document borders do not go from 0"),
        (HEAD + 60, struct.pack("<q", 2), "document borders do not go from 0"),
    ],
)
def test_damaged_index(tmp_path, offset, data, message):
    path = megatron_pair(tmp_path, [[1, 2], [3], [4]])
    assert len(MegatronSource([path], RULE)) == 3
    spoil(tmp_path / "text.idx", offset, data)
    with pytest.raises(DataError, match=message):
        MegatronSource([path], RULE)


def test_truncated_and_missing_files(tmp_path):
    path = tmp_path / "text.bin"
    megatron_pair(tmp_path, [[1, 2], [3]])
    whole = (tmp_path / "text.idx").read_bytes()
    for length in (0, 20, len(whole) - 1):
        (tmp_path / "text.idx").write_bytes(whole[:length])
        with pytest.raises(DataError, match="no Megatron index|truncated or damaged"):
            MegatronSource([str(path)], RULE)
    (tmp_path / "text.idx").write_bytes(whole + b"\0\0")  # one mode per sequence
    with pytest.raises(DataError, match="multimodal in Megatron's own way"):
        MegatronSource([str(path)], RULE)
    (tmp_path / "text.idx").write_bytes(whole)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated or belongs to another .idx"):
        MegatronSource([str(path)], RULE)
    path.unlink()
    with pytest.raises(DataError, match="text.bin: cannot be read .* side by side"):
        MegatronSource([str(path)], RULE)


def test_a_file_that_changes_during_the_run(tmp_path):
    path = tmp_path / "text.bin"
    source = MegatronSource([megatron_pair(tmp_path, [[1, 2], [3]])], RULE)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match="do not change data during a run"):
        reason_of(source[0])
