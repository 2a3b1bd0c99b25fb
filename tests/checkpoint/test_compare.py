"""What `verify` says: every tensor that differs, how, and by how much."""

import math

import pytest
import torch

from megatron_vl.checkpoint import weights as weights_module
from megatron_vl.checkpoint.compare import compare, digests_of, open_side
from megatron_vl.checkpoint.digests import write_digests
from megatron_vl.errors import CheckpointError
from tests.checkpoint.test_hf_save import weights_of
from tests.fixtures.paths import TINY_A


def said(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    return compare(weights_of(left), weights_of(right), quiet=True).differences


def test_equal_bits_are_equal():
    tensors = {"a": torch.tensor([1.0, math.nan, -0.0]), "b": torch.randn(3, 4).bfloat16()}
    assert said(tensors, {name: tensor.clone() for name, tensor in tensors.items()}) == []


def test_names_shapes_and_formats():
    left = {"a": torch.ones(4), "b": torch.ones(2, 3), "c": torch.ones(3), "d": torch.ones(3) / 3}
    right = {
        "b": torch.ones(3, 2),
        "c": torch.ones(3).bfloat16(),
        "d": left["d"].bfloat16(),
        "e": torch.ones(1),
    }
    assert said(left, right) == [
        "missing on the right: a",
        "shape: b is [2, 3] and [3, 2]",
        "dtype: c is F32 and BF16; equal values",
        "dtype: d is F32 and BF16; 3 of 3 differ, largest difference 0.000651, largest relative difference 0.00195",
        "missing on the left: e",
    ]


def test_one_value_in_one_block(monkeypatch):
    monkeypatch.setattr(weights_module, "BLOCK_BYTES", 64)
    left = {"a": torch.ones(50, 4), "b": torch.ones(5)}
    right = {name: tensor.clone() for name, tensor in left.items()}
    right["a"][41, 2] = 1.5
    right["a"][3, 0] = 1.25
    assert said(left, right) == [
        "values: a: 2 of 200 differ, largest difference 0.5, largest relative difference 0.333"
    ]


@pytest.mark.parametrize(
    ("other", "largest", "relative"), [(-0.0, "0", "0"), (math.nan, "inf", "inf"), (math.inf, "inf", "inf")]
)
def test_bits_count_not_values(other, largest, relative):
    sentence = said({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, other])})
    assert sentence == [
        f"values: a: 1 of 2 differ, largest difference {largest}, largest relative difference {relative}"
    ]


def test_a_digest_file_stands_for_a_folder(tmp_path):
    weights = open_side(TINY_A)
    write_digests(tmp_path / "d.json", digests_of(weights, quiet=True))
    digests = open_side(tmp_path / "d.json")
    assert compare(weights, digests, quiet=True).differences == []
    assert compare(digests, digests, quiet=True).differences == []
    changed = dict(weights)
    changed["model.norm.weight"] = weights_of({"model.norm.weight": torch.zeros(64)})["model.norm.weight"]
    changed["lm_head.weight"] = weights["lm_head.weight"].as_dtype(torch.bfloat16)
    assert compare(changed, digests, quiet=True).differences == [
        "dtype: lm_head.weight is BF16 and F32",
        "values: model.norm.weight: the digests differ",
    ]


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        open_side(tmp_path)
    with pytest.raises(CheckpointError, match="not a digest file"):
        open_side(TINY_A / "config.json")
