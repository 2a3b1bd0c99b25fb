"""Weights, gradients and optimizer: the plan against what Megatron-Core allocates, to the byte on every rank."""

from dataclasses import replace

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import PrecisionConfig, RunConfig
from megatron_vl.parity.layouts import parse_layout
from megatron_vl.plan.cost import parameters
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.overlap import bucket_elements
from megatron_vl.plan.stages import held_stages, plan_stages
from megatron_vl.plan.state_bytes import bytes_of_rank, bytes_of_stage, owned
from megatron_vl.plan.tensors import Weight, weights_of_chunk
from tests.fixtures.small import SMALL
from tests.plan.on_ranks import held_on_rank

# No dimension is a multiple of 64, so that all of the padding shows.
ODD = replace(
    SMALL,
    vision=replace(SMALL.vision, hidden_size=24, num_attention_heads=2, ffn_hidden_size=52),
    text=replace(SMALL.text, hidden_size=40, kv_channels=10, ffn_hidden_size=52, vocab_size=515),
)
FROZEN = replace(ODD, freeze_vision=True)

# Buckets: none closes inside the projector or the embedding by chance alone, some hold one weight, some many.
CUT = {"overlap_grad_reduce": True, "ddp_bucket_size": 1700}

CASES = [
    ("1", "data", "bf16", True, ODD),
    ("dp3", "data", "fp32", True, ODD),
    ("dp2", "data", "bf16", False, FROZEN),
    ("pp2vpp2", "data", "fp32", True, FROZEN),
    ("dp2tp2pp2", "data", "bf16", True, ODD),
    ("dp2cp2tp2sp", "tensor", "bf16", True, ODD),
    ("tp4sp", "data", "fp32", False, ODD),
    ("dp2tp2pp2", "all", "bf16", True, ODD),
    ("pp2vpp2", "all", "fp32", False, FROZEN),
    ("cp4", "data", "bf16", True, ODD),
    ("pp4", "data", "fp32", True, ODD),
    ("tp2pp2cp2sp", "data", "bf16", True, ODD),
]
CUT_CASES = [
    ("1", "data", "bf16", True, ODD),
    ("dp3", "data", "fp32", True, ODD),
    ("dp2pp2vpp2", "data", "bf16", True, FROZEN),
    ("dp2cp2tp2sp", "tensor", "bf16", True, ODD),
    ("dp2", "data", "fp32", False, ODD),
]


@pytest.mark.parametrize(
    ("name", "placement", "dtype", "distributed", "model", "keys"),
    [(*case, {}) for case in CASES] + [(*case, CUT) for case in CUT_CASES],
)
def test_live_bytes(world, name, placement, dtype, distributed, model, keys):
    named = parse_layout(name, placement, "cpu")
    config = RunConfig(
        model=model,
        parallel=replace(named.parallel, use_distributed_optimizer=distributed, **keys),
        precision=PrecisionConfig(params=dtype),
    )
    layout = Layout.from_config(config.parallel, named.world_size)
    stages = held_stages(model.text.num_layers, layout)
    size = {"bf16": 2, "fp32": 4}[dtype]
    bucket = bucket_elements(config.parallel, layout.dp * layout.cp, on_cpu=True)
    for held in world.run(named.world_size, held_on_rank, config):
        here = stages[held.coords.pp]
        planned = [[(w.name, w.size) for w in weights_of_chunk(model, layout, stage)] for stage in here]
        assert held.weights == planned
        told = bytes_of_rank(model, layout, here, held.coords, size, distributed, bucket)
        assert (told.weights, told.gradients, told.optimizer) == (
            held.weight_bytes, held.gradient_bytes, held.optimizer_bytes,
        )  # fmt: skip
        fullest = bytes_of_stage(model, layout, here, size, distributed, bucket)
        steps = 4 * sum(map(len, planned))
        assert fullest.optimizer + steps >= told.optimizer


@pytest.mark.parametrize("model", [ODD, ModelConfig()])
def test_pieces_cover_every_weight_once(model):
    layout = Layout(dp=3, cp=2)
    (stage,) = plan_stages(model.text.num_layers, 1)[0]
    weights = weights_of_chunk(model, layout, stage)
    assert sum(weight.size for weight in weights) == parameters(model)["total"]
    assert sum(owned(weights, (), 6, shard, True)[0] for shard in range(6)) == parameters(model)["total"]


def test_a_bias_behind_a_sharded_product_is_whole():
    (stage,) = plan_stages(4, 1)[0]
    found = {
        weight.name: weight.size for weight in weights_of_chunk(ODD, Layout(tp=2, placement="tensor"), stage)
    }
    assert found["vision_model.vit_downsampler2.bias"] == 4 * 24
    assert found["vision_model.vit_downsampler1.bias"] == 24


def test_padding_by_hand():
    """Last weight first: 5 at 0..5, 3 at 64..67, end at 128."""
    weights = (Weight("a", 3, "decoder"), Weight("b", 5, "decoder"))
    assert owned(weights, (), 2, 0, True) == (5, 1)
    assert owned(weights, (), 2, 1, True) == (3, 1)
    assert owned(weights, (), 1, 0, True) == (8, 2)
