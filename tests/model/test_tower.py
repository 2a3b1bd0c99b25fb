"""The tower's own rules: full attention, forbidden names, rotary angles, position table."""

import math

import pytest
import torch

from megatron_vl.errors import ConfigError, DataError
from megatron_vl.model.backend import choose_backend
from megatron_vl.model.fusion import image_slots, put_features
from megatron_vl.ops.activation import quick_gelu
from megatron_vl.ops.pixels import patchify
from megatron_vl.ops.rotary import rotary_angles
from tests.fixtures.independent import interpolation
from tests.fixtures.small import SMALL
from tests.model.on_ranks import tower_on_rank


@pytest.fixture(scope="module")
def seen(world):
    return world.run(1, tower_on_rank, SMALL)[0]


def test_the_tower_looks_both_ways_and_the_decoder_back_only(seen):
    assert seen["first patch"] > 1e-4
    assert seen["earlier tokens"] == 0 and seen["last token"] > 1e-2


def test_names_that_megatron_would_sum_over_tp_are_absent_from_the_tower(seen):
    """With q/k norm in the decoder's config every `q_layernorm` without a mark is reduced over TP."""
    assert [n for n in seen["vision names"] if "q_layernorm" in n or "k_layernorm" in n] == []
    assert any("q_layernorm" in n for n in seen["all names"])


def test_position_table_is_bilinear_with_half_pixel_centres(seen):
    resized, table = seen["tables"]
    along = interpolation(8, 4)
    expected = torch.einsum("if,jg,fgc->ijc", along, along, table.double().view(8, 8, -1)).reshape(16, -1)
    torch.testing.assert_close(resized.double(), expected, rtol=1e-6, atol=1e-6)


def test_rotary_angles_of_the_released_tower():
    """spec/model.md 2.1: 24 frequencies per axis, first 1.0, last 1.468e-4; columns first; whole steps."""
    angles = rotary_angles(36, 96, 10000.0, torch.device("cpu"))
    assert angles.shape == (36 * 36, 1, 1, 96) and angles.dtype == torch.float32
    patch = angles[36 * 5 + 7, 0, 0]  # row 5, column 7
    assert patch[0] == patch[1] == 7.0 and patch[48] == patch[49] == 5.0
    assert patch[47].item() == pytest.approx(7 * 1.468e-4, rel=1e-3)
    assert patch[95].item() == pytest.approx(5 * 10000 ** (-46 / 48), rel=1e-6)
    assert torch.equal(patch[0::2], patch[1::2])
    assert angles.max().item() == 35.0


def test_patches_times_a_matrix_is_the_patch_convolution():
    pixels, weight = (
        torch.randn(2, 3, 28, 42, dtype=torch.float64),
        torch.randn(8, 3, 14, 14, dtype=torch.float64),
    )
    ours = patchify(pixels, 14) @ weight.reshape(8, -1).T
    theirs = torch.nn.functional.conv2d(pixels, weight, stride=14).flatten(2).permute(2, 0, 1)
    torch.testing.assert_close(ours, theirs)


def test_quick_gelu():
    x = torch.tensor([-2.0, 0.0, 1.5])
    expected = [v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]
    assert quick_gelu(x).tolist() == pytest.approx(expected, rel=1e-6)


def test_features_go_to_their_slots():
    ids = torch.tensor([[1, 9, 9, 2], [9, 3, 4, 5]])
    features = torch.arange(6.0).reshape(3, 2).requires_grad_()
    embeddings = torch.zeros(4, 2, 2, requires_grad=True)
    rows, positions = image_slots(ids, 9, 3, ["a", "b"])
    assert (rows.tolist(), positions.tolist()) == ([0, 0, 1], [1, 2, 0])
    out = put_features(embeddings, features, rows, positions)
    assert out[1, 0].tolist() == [0, 1] and out[2, 0].tolist() == [2, 3] and out[0, 1].tolist() == [4, 5]
    assert out[0, 0].tolist() == [0, 0]
    out.sum().backward()
    assert features.grad.eq(1).all() and embeddings.grad.sum() == 16 - 6


def test_a_mismatch_of_slots_and_features_names_samples_and_both_counts():
    with pytest.raises(DataError, match=r"samples q7, q8: 3 <im_patch> ids .*but 2 image feature rows"):
        image_slots(torch.tensor([[9, 9, 9]]), 9, 2, ["q7", "q8"])


def test_transformer_engine_is_refused_without_cuda():
    with pytest.raises(ConfigError, match="it needs a CUDA device and an importable transformer-engine 2.11"):
        choose_backend("transformer_engine")
    assert choose_backend("auto").name == "torch"
    with pytest.raises(ConfigError, match="cp_comm_type = a2a: .*auto chose the torch layers"):
        choose_backend("auto", "a2a")
