"""Per-rank shares add up to the whole."""

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.plan.cost import PARTS, TOWER_PARTS, parameters, sample_flops
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.shares import parameters_of_stage
from megatron_vl.plan.stages import held_stages, plan_stages
from megatron_vl.plan.state_bytes import bytes_of_stage
from megatron_vl.plan.vision_share import CROP, GLOBAL
from tests.fixtures.shares import flops_by_rank

KINDS = [CROP] * 5 + [GLOBAL] + [CROP] * 2 + [GLOBAL, GLOBAL]
LAYOUTS = [
    Layout(tp=tp, cp=cp, dp=2, pp=pp, vpp=vpp, placement=placement)
    for tp, cp, pp, vpp in [
        (1, 1, 1, 1),
        (2, 1, 2, 1),
        (4, 1, 1, 1),
        (1, 2, 2, 2),
        (2, 2, 2, 1),
        (2, 4, 1, 1),
    ]
    for placement in ("data", "tensor", "all")
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_flops_of_all_ranks_are_the_flops_of_the_sample(layout):
    stages = held_stages(4, layout)
    shares = flops_by_rank(STEP3_VL_TINY, layout, stages, KINDS, [40, 24], tokens=72)
    assert len(shares) == layout.tp * layout.cp * layout.pp
    whole = sample_flops(STEP3_VL_TINY, KINDS, [40, 24], tokens=72)
    for part in PARTS:
        assert sum(share[part] for share in shares.values()) == pytest.approx(whole[part], rel=1e-12)
    for coords, share in shares.items():
        assert layout.encodes(coords) or all(share[part] == 0 for part in TOWER_PARTS)
        assert (share["lm_head"] > 0) == (coords.pp == layout.pp - 1)


def test_tower_shares_in_both_placements():
    stages = plan_stages(4, 1)
    data = flops_by_rank(STEP3_VL_TINY, Layout(tp=2), stages, [GLOBAL, CROP], [8])
    assert [share["projector"] for share in data.values()] == [
        2 * 4 * 256 * 128,  # the global view
        2 * 1 * 256 * 128,  # the crop
    ]
    tensor = flops_by_rank(
        STEP3_VL_TINY, Layout(tp=2, placement="tensor"), stages, [CROP, GLOBAL, GLOBAL], [8]
    )
    assert [share["projector"] for share in tensor.values()] == [2 * 9 * 256 * 128 / 2] * 2


def test_the_vocabulary_is_padded():
    shares = flops_by_rank(STEP3_VL_TINY, Layout(tp=3), plan_stages(4, 1), [], [8])
    assert shares[Coords(0, 0, 0, 0)]["lm_head"] == 2 * 8 * 128 * 171


def test_one_rank_holds_every_parameter():
    for model in (ModelConfig(), STEP3_VL_TINY):
        counts = parameters(model)
        held = parameters_of_stage(model, Layout(), plan_stages(model.text.num_layers, 1)[0])
        assert held == {part: counts[part] for part in ("vision", "projector", "decoder")}


@pytest.mark.parametrize("vpp", [1, 2])
def test_stages_hold_every_parameter(vpp):
    layout = Layout(pp=2, vpp=vpp)
    held = [parameters_of_stage(STEP3_VL_TINY, layout, chunks) for chunks in plan_stages(4, 2, vpp)]
    assert sum(sum(counts.values()) for counts in held) == parameters(STEP3_VL_TINY)["total"]
    assert held[1]["vision"] == 0


def test_sharding_replicates_only_vectors_and_positions():
    stage = plan_stages(36, 1)[0]
    whole, half = (
        parameters_of_stage(ModelConfig(), Layout(tp=tp, placement="tensor"), stage) for tp in (1, 2)
    )
    for part in whole:
        assert 1 <= 2 * half[part] / whole[part] < 1.003
    data = parameters_of_stage(ModelConfig(), Layout(tp=2), stage)
    assert (data["vision"], data["projector"]) == (whole["vision"], whole["projector"])


def test_bytes():
    """6 + 12 / (DP x CP) bytes per parameter in bf16 with the distributed optimizer."""
    stage, total = plan_stages(36, 1)[0], parameters(ModelConfig())["total"]
    memory = bytes_of_stage(ModelConfig(), Layout(dp=2, cp=2), stage)
    assert memory.total == 6 * total + 3 * total
    assert (
        bytes_of_stage(ModelConfig(), Layout(dp=4), stage, distributed_optimizer=False).optimizer
        == 12 * total
    )
    assert bytes_of_stage(ModelConfig(), Layout(), stage, weight_bytes=4).total == (4 + 4 + 8) * total
    frozen = bytes_of_stage(ModelConfig(freeze_decoder=True, freeze_vision=True), Layout(), stage)
    assert (frozen.weights, frozen.gradients) == (2 * total, 4 * 4096 * 6144)
