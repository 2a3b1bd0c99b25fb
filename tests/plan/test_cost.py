"""The cost model against the published split of the released model and the derived anchors."""

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.plan.cost import (
    PARTS,
    TOWER_PARTS,
    parameters,
    peak_flops,
    sample_flops,
    tower_and_decoder,
    train_flops,
    train_multipliers,
    view_flops,
)
from megatron_vl.plan.vision_share import CROP, GLOBAL

RELEASED = ModelConfig()


def test_parameters_of_the_release():
    assert parameters(RELEASED) == {
        "conv1": 903_168,
        "positional_embedding": 4_153_344,
        "ln_pre": 3_072,
        "vision_blocks": 1_738_443_520,
        "vit_downsampler1": 42_470_400,
        "vit_downsampler2": 169_875_456,
        "projector": 25_165_824,
        "token_embedding": 622_329_856,
        "decoder_layers": 6_946_071_552,
        "final_norm": 4_096,
        "lm_head": 622_329_856,
        "vision_without_downsamplers": 1_743_503_104,
        "vision": 1_955_848_960,
        "decoder": 8_190_735_360,
        "total": 10_171_750_144,
    }


def test_forward_flops_of_the_views():
    assert sum(view_flops(RELEASED, GLOBAL).values()) == pytest.approx(11.64e12, rel=1e-3)
    assert sum(view_flops(RELEASED, CROP).values()) == pytest.approx(5.05e12, rel=1e-3)


def test_one_tower_product_by_hand():
    crop = view_flops(STEP3_VL_TINY, CROP)
    assert crop == {
        "patch_embed": 2 * 16 * 588 * 64,
        "vision_linear": 3 * 2 * 16 * (64 * 192 + 64 * 64 + 2 * 64 * 176),
        "vision_attention": 3 * 2 * (2 * 16 * 16 * 64),
        "downsamplers": 2 * 4 * (64 * 9) * 128 + 2 * 1 * (128 * 9) * 256,
        "projector": 2 * 256 * 128,
    }


def test_linear_training_cost_of_a_token():
    forward = sample_flops(RELEASED, [], [1])
    trained = train_flops(RELEASED, forward)
    assert trained["decoder_linear"] + trained["lm_head"] == pytest.approx(45.4e9, rel=1e-3)


@pytest.mark.parametrize(("length", "gflop"), [(8192, 52.7), (32768, 74.4), (65536, 103.4), (131072, 161.4)])
def test_training_cost_of_a_token_at_length(length, gflop):
    trained = train_flops(RELEASED, sample_flops(RELEASED, [], [length]))
    assert sum(trained.values()) / length == pytest.approx(gflop * 1e9, rel=1e-3)


def test_image_sample():
    """One view + 6 crops: about 125.7 TFLOP of tower against 29.7 TFLOP of decoder linear work."""
    trained = train_flops(RELEASED, sample_flops(RELEASED, [CROP] * 6 + [GLOBAL], [655]))
    assert tower_and_decoder(trained)[0] == pytest.approx(125.7e12, rel=1e-3)
    assert trained["decoder_linear"] + trained["lm_head"] == pytest.approx(29.7e12, rel=2e-3)


def test_packed_rows_cost_less_attention_and_the_same_linear_work():
    whole, packed = sample_flops(RELEASED, [], [4096]), sample_flops(RELEASED, [], [1024] * 4)
    assert packed["decoder_attention"] * 4 == whole["decoder_attention"]
    assert packed["decoder_linear"] == whole["decoder_linear"]


def test_padding_counts_only_when_asked_for():
    padded = sample_flops(RELEASED, [], [10], tokens=16)
    assert padded["lm_head"] * 10 == sample_flops(RELEASED, [], [10])["lm_head"] * 16
    assert padded["decoder_attention"] == sample_flops(RELEASED, [], [10])["decoder_attention"]


@pytest.mark.parametrize(
    ("frozen", "tower", "projector", "linear", "attention"),
    [
        ("", 3, 3, 3, 3),
        ("vision", 1, 2, 3, 3),
        ("vision projector", 1, 1, 3, 3),
        ("decoder", 3, 3, 2, 3),
        ("projector", 3, 2, 3, 3),
        ("vision decoder", 1, 2, 2, 3),
        ("projector decoder", 3, 2, 2, 3),
    ],
)
def test_frozen_parts(frozen, tower, projector, linear, attention):
    model = ModelConfig(**{f"freeze_{part}": True for part in frozen.split()})
    multipliers = train_multipliers(model)
    assert {multipliers[part] for part in TOWER_PARTS if part != "projector"} == {tower}
    assert (multipliers["projector"], multipliers["decoder_linear"], multipliers["lm_head"]) == (
        projector,
        linear,
        linear,
    )
    assert multipliers["decoder_attention"] == attention


def test_recomputation_adds_forward_passes():
    plain = train_multipliers(RELEASED)
    full = train_multipliers(RELEASED, RecomputeConfig(decoder="full", vision="full"))
    assert {part: full[part] - plain[part] for part in PARTS if full[part] != plain[part]} == {
        "vision_linear": 1,
        "vision_attention": 1,
        "decoder_linear": 1,
        "decoder_attention": 1,
    }
    chunks = train_multipliers(RELEASED, RecomputeConfig(vision_chunk_views=2))
    assert {
        part: chunks[part] - plain[part] for part in PARTS if chunks[part] != plain[part]
    } == dict.fromkeys(TOWER_PARTS, 1)
    selective = train_multipliers(RELEASED, RecomputeConfig(decoder="selective"))
    assert (selective["decoder_attention"], selective["decoder_linear"]) == (4, 3)
    frozen = train_multipliers(ModelConfig(freeze_vision=True), RecomputeConfig(vision="full"))
    assert frozen["vision_linear"] == 1


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H200", "fp8") == 1979e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == peak_flops("NVIDIA A100-PCIE-40GB") == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert (peak_flops("NVIDIA H100 PCIe"), peak_flops("NVIDIA H100 NVL")) == (756e12, 835e12)
    assert (peak_flops("NVIDIA H200 NVL"), peak_flops("NVIDIA B200")) == (835e12, 2250e12)
    for unknown in (
        "cpu",
        "NVIDIA GB200",
        "NVIDIA L40S",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100X",
    ):
        assert peak_flops(unknown) is None
