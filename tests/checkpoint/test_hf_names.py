"""The name table: released names and shapes, and that every step of the way back is the inverse."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vl.checkpoint.hf_names import (
    Rule,
    all_rules,
    expected_tensors,
    global_name,
    shard,
    to_hf,
    to_ours,
    unshard,
)
from megatron_vl.config.presets import STEP3_VL_10B, STEP3_VL_TINY
from megatron_vl.plan.cost import parameters

# spec/model.md 6.2
RELEASED = {
    "model.embed_tokens.weight": (151936, 4096),
    "lm_head.weight": (151936, 4096),
    "model.norm.weight": (4096,),
    "model.layers.35.self_attn.q_proj.weight": (4096, 4096),
    "model.layers.0.self_attn.k_proj.weight": (1024, 4096),
    "model.layers.0.self_attn.v_proj.weight": (1024, 4096),
    "model.layers.0.self_attn.o_proj.weight": (4096, 4096),
    "model.layers.0.self_attn.q_norm.weight": (128,),
    "model.layers.0.mlp.gate_proj.weight": (12288, 4096),
    "model.layers.0.mlp.down_proj.weight": (4096, 12288),
    "model.layers.0.post_attention_layernorm.weight": (4096,),
    "vision_model.conv1.weight": (1536, 3, 14, 14),
    "vision_model.positional_embedding": (2704, 1536),
    "vision_model.ln_pre.bias": (1536,),
    "vision_model.transformer.resblocks.46.attn.in_proj_weight": (4608, 1536),
    "vision_model.transformer.resblocks.0.attn.in_proj_bias": (4608,),
    "vision_model.transformer.resblocks.0.attn.out_proj.weight": (1536, 1536),
    "vision_model.transformer.resblocks.0.ls_1.gamma": (1536,),
    "vision_model.transformer.resblocks.0.mlp.c_fc.weight": (8960, 1536),
    "vision_model.transformer.resblocks.0.mlp.c_proj.weight": (1536, 8960),
    "vision_model.vit_downsampler1.weight": (3072, 1536, 3, 3),
    "vision_model.vit_downsampler2.weight": (6144, 3072, 3, 3),
    "vit_large_projector.weight": (4096, 6144),
}


def test_the_release_has_1066_tensors():
    tensors = expected_tensors(STEP3_VL_10B)
    assert len(tensors) == 1066
    assert sum(math.prod(shape) for shape in tensors.values()) == 10_171_750_144
    assert {name: tensors.get(name) for name in RELEASED} == RELEASED
    assert sum(n.startswith("vision_model.") for n in tensors) == 666


@pytest.mark.parametrize("model", [STEP3_VL_10B, STEP3_VL_TINY], ids=["10b", "tiny"])
def test_the_table_and_the_cost_model_count_alike(model):
    assert sum(math.prod(shape) for shape in expected_tensors(model).values()) == parameters(model)["total"]


def kinds() -> list[Rule]:
    """One rule of each (kind, axis, padded) of the tiny model."""
    found = {(r.kind, r.axis, r.padded, len(r.hf[0][1])): r for r in all_rules(STEP3_VL_TINY)}
    return list(found.values())


@pytest.mark.parametrize("rule", kinds(), ids=lambda r: f"{r.kind}-{r.axis}-{r.ours.split('.')[-2]}")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_there_and_back(rule: Rule, size: int):
    """Released -> ours -> shards -> ours -> released gives every element back."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in rule.hf}
    whole = to_ours(rule, list(tensors.values()), STEP3_VL_TINY)
    shards = [shard(rule, whole, size, rank) for rank in range(size)]
    assert len({s.shape for s in shards}) == 1
    back = to_hf(rule, unshard(rule, shards), STEP3_VL_TINY)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


def test_a_vocabulary_that_does_not_divide_is_padded_with_zeros():
    rule = next(r for r in all_rules(STEP3_VL_TINY) if r.padded)
    whole = torch.randn(509, 8)
    rule = Rule(rule.ours, ((rule.hf[0][0], (509, 8)),), rule.kind, rule.axis, rule.part, padded=True)
    shards = [shard(rule, whole, 4, rank) for rank in range(4)]
    assert [tuple(s.shape) for s in shards] == [(128, 8)] * 4
    assert not shards[3][125:].any()
    assert torch.equal(unshard(rule, shards), whole)


def test_gate_and_up_are_sharded_each_by_itself():
    rule = next(r for r in all_rules(STEP3_VL_TINY) if r.kind == "gate_up")
    gate, up = (torch.full(shape, value) for (_, shape), value in zip(rule.hf, (1.0, 2.0)))
    part = shard(rule, to_ours(rule, [gate, up], STEP3_VL_TINY), 2, 1)
    first, second = part.chunk(2)
    assert first.unique().tolist() == [1.0] and second.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("language_model.decoder.layers.1.mlp.linear_fc2.weight",
         "language_model.decoder.layers.7.mlp.linear_fc2.weight"),
        ("module.language_model.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
         "language_model.decoder.layers.5.input_layernorm.weight"),
        ("vision_model.transformer.layers.1.mlp.linear_fc1.layer_norm_bias",
         "vision_model.transformer.layers.1.pre_mlp_layernorm.bias"),
        ("vision_model.transformer.layers.1.self_attn_bda.gamma",
         "vision_model.transformer.layers.1.self_attn_bda.gamma"),
    ],
)  # fmt: skip
def test_names_of_a_stage_become_global(local: str, expected: str):
    """Decoder layers by their global index; Transformer Engine's fused norms under their own names."""
    assert global_name(local, [5, 7]) == expected


def test_every_parameter_of_ours_stands_in_the_table_once():
    names = [rule.ours for rule in all_rules(STEP3_VL_TINY)]
    assert len(names) == len(set(names))
    released = [name for rule in all_rules(STEP3_VL_TINY) for name, _ in rule.hf]
    assert len(released) == len(set(released))
