"""Ranks built without memory: they are what the plan says, and what live ranks are; a wrong plan is found."""

from dataclasses import replace

import pytest

from megatron_vl.config.schema import (
    DataConfig,
    PackingConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)
from megatron_vl.parity.layouts import parse_layout
from megatron_vl.plan.checks import check_run
from megatron_vl.plan.devices import DEVICES
from megatron_vl.plan.plan_command import candidate_of
from megatron_vl.plan.rank_state import differences, plan_rank
from megatron_vl.plan.search import Question
from megatron_vl.train.dry_rank import build_rank
from tests.fixtures.small import SMALL

# No dimension is a multiple of 64, so that all of the padding shows.
ODD = replace(
    SMALL,
    vision=replace(SMALL.vision, hidden_size=24, num_attention_heads=2, ffn_hidden_size=52),
    text=replace(SMALL.text, hidden_size=40, kv_channels=10, ffn_hidden_size=52, vocab_size=515),
)


def question_of(name, placement="data", model=ODD, device="H100", packed=False, **keys):
    """The question of a small run in a named layout, and the ranks of it."""
    named = parse_layout(name, placement, "cpu")
    parallel = {k: v for k, v in keys.items() if k in ("use_distributed_optimizer", "ddp_bucket_size")}
    recompute = {k: v for k, v in keys.items() if k in ("decoder", "vision", "vision_chunk_views", "offload")}
    config = RunConfig(
        model=model,
        parallel=replace(named.parallel, **parallel),
        precision=PrecisionConfig(params=keys.get("params", "bf16")),
        recompute=RecomputeConfig(**recompute),
        data=DataConfig(seq_length=128, packing=PackingConfig(enabled=packed)),
        train=TrainConfig(global_batch_size=48, micro_batch_size=1 if packed else 2),
    )
    assert check_run(config, named.world_size) == []
    return Question(config, DEVICES[device], named.world_size, 0.5, 50 if packed else None)


def compare(question, rank):
    candidate = candidate_of(question.config, question.world_size)
    built = build_rank(question, candidate, rank)
    return list(differences(plan_rank(question, candidate, rank), built)), built


CASES = [
    ("1", {}),
    ("dp3", {"params": "fp32", "ddp_bucket_size": 1700}),
    ("dp2tp2pp2", {"placement": "all", "vision_chunk_views": 2}),
    ("pp2vpp2tp2", {"vision": "full", "decoder": "full"}),
    ("dp2cp2tp2sp", {"placement": "tensor", "packed": True}),
    ("cp4ag", {"offload": True}),
    (
        "pp2vpp2",
        {"placement": "all", "model": replace(ODD, freeze_vision=True), "use_distributed_optimizer": False},
    ),
    ("tp2pp2cp2sp", {"model": replace(ODD, freeze_vision=True, freeze_decoder=True), "packed": True}),
    ("dp2pp4", {"model": replace(ODD, freeze_decoder=True), "device": "CPU", "params": "auto"}),
]


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_small_layouts(name, keys):
    question = question_of(name, **keys)
    for rank in range(question.world_size):
        found, built = compare(question, rank)
        assert found == [], rank
        assert built.weight_bytes > 0
