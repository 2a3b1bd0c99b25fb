"""The name table: the released names and shapes, and conversions that can be undone."""

import math

import pytest
import torch

from megatron_vl.checkpoint.hf_names import (
    all_rules,
    expected_tensors,
    global_name,
    shard,
    to_hf,
    to_ours,
    unshard,
)
from megatron_vl.config.presets import STEP3_VL_10B
from tests.fixtures.checkpoints import released_shapes
from tests.fixtures.small import SMALL, RandomWeights

RELEASED = {
    "model_type": "step_robotics",
    "vision_config": {"image_size": 728, "width": 1536, "layers": 47, "heads": 16},
    "text_config": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 36, "vocab_size": 151936,
    },
}  # fmt: skip


def test_the_10b_checkpoint_has_1066_tensors_and_the_published_size():
    names = expected_tensors(STEP3_VL_10B)
    assert len(names) == 1066 == len([n for rule in all_rules(STEP3_VL_10B) for n in rule.hf])
    assert sum(math.prod(shape) for shape in names.values()) == 10_171_750_144
    assert names == released_shapes(RELEASED)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (151936, 4096)),
        ("lm_head.weight", (151936, 4096)),
        ("model.layers.35.self_attn.q_proj.weight", (4096, 4096)),
        ("model.layers.0.self_attn.o_proj.weight", (4096, 4096)),
        ("model.layers.0.self_attn.k_proj.weight", (1024, 4096)),
        ("model.layers.0.self_attn.q_norm.weight", (128,)),
        ("model.layers.17.mlp.gate_proj.weight", (12288, 4096)),
        ("model.layers.17.mlp.down_proj.weight", (4096, 12288)),
        ("model.layers.1.post_attention_layernorm.weight", (4096,)),
        ("model.norm.weight", (4096,)),
        ("vision_model.conv1.weight", (1536, 3, 14, 14)),
        ("vision_model.positional_embedding", (2704, 1536)),
        ("vision_model.ln_pre.bias", (1536,)),
        ("vision_model.transformer.resblocks.46.attn.in_proj_weight", (4608, 1536)),
        ("vision_model.transformer.resblocks.46.attn.in_proj_bias", (4608,)),
        ("vision_model.transformer.resblocks.0.ls_2.gamma", (1536,)),
        ("vision_model.transformer.resblocks.0.mlp.c_fc.weight", (8960, 1536)),
        ("vision_model.transformer.resblocks.0.mlp.c_proj.bias", (1536,)),
        ("vision_model.vit_downsampler1.weight", (3072, 1536, 3, 3)),
        ("vision_model.vit_downsampler2.weight", (6144, 3072, 3, 3)),
        ("vit_large_projector.weight", (4096, 6144)),
    ],
)
def test_shapes_of_the_specification(name, shape):
    assert expected_tensors(STEP3_VL_10B)[name] == shape


@pytest.mark.parametrize("size", [1, 2, 4])
def test_conversion_and_sharding_can_be_undone(size):
    weights, kinds = RandomWeights(SMALL), set()
    for rule in all_rules(SMALL):
        released = {name: weights(name) for name, _ in rule.hf}
        whole = to_ours(rule, list(released.values()), SMALL)
        if rule.axis is not None and whole.shape[rule.axis] % size == 0:
            shards = [shard(rule, whole, size, rank) for rank in range(size)]
            assert len({s.shape for s in shards}) == 1
            assert sum(s.numel() for s in shards) == whole.numel()
            assert torch.equal(unshard(rule, shards), whole)
        back = to_hf(rule, whole, SMALL)
        assert back.keys() == released.keys()
        assert all(torch.equal(back[name], released[name]) for name in back), rule
        kinds.add(rule.kind)
    assert kinds == {"copy", "rows", "qkv", "stacked_qkv", "gate_up"}


def rule_named(name: str):
    return next(rule for rule in all_rules(SMALL) if rule.ours == name)


def test_heads_stay_whole_on_a_rank():
    """q, k, v of one key-value group stand together; gate and up are cut each by itself."""
    text = SMALL.text
    d, h = text.kv_channels, text.hidden_size
    rows = {"q": text.num_attention_heads * d, "k": text.num_query_groups * d, "v": text.num_query_groups * d}
    q, k, v = (
        torch.arange(n, dtype=torch.float32)[:, None].expand(n, h) + 1000 * i
        for i, n in enumerate(rows.values())
    )
    rule = rule_named("language_model.decoder.layers.0.self_attention.linear_qkv.weight")
    second = shard(rule, to_ours(rule, [q, k, v], SMALL), 2, 1)[:, 0]
    assert second.tolist() == [
        *range(2 * d, 4 * d),
        *range(1000 + d, 1000 + 2 * d),
        *range(2000 + d, 2000 + 2 * d),
    ]
    rule = rule_named("language_model.decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = torch.zeros(text.ffn_hidden_size, h), torch.ones(text.ffn_hidden_size, h)
    first = shard(rule, to_ours(rule, [gate, up], SMALL), 2, 0)
    assert first[:, 0].tolist() == [0.0] * (text.ffn_hidden_size // 2) + [1.0] * (text.ffn_hidden_size // 2)


def test_a_padded_vocabulary_loses_its_padding():
    from dataclasses import replace

    model = replace(SMALL, text=replace(SMALL.text, vocab_size=509))
    rule = next(rule for rule in all_rules(model) if rule.padded)
    whole = torch.randn(509, 32)
    shards = [shard(rule, whole, 4, rank) for rank in range(4)]
    assert {tuple(s.shape) for s in shards} == {(128, 32)} and shards[3][-3:].abs().sum() == 0
    assert torch.equal(unshard(rule, shards), whole)


def test_names_of_stages_and_wrappers():
    local = "module.module.language_model.decoder.layers.1.mlp.linear_fc2.weight"
    assert global_name(local, (7, 9)) == "language_model.decoder.layers.9.mlp.linear_fc2.weight"
    tower = "vision_model.transformer.layers.1.mlp.linear_fc2.weight"
    assert global_name(tower, (7, 9)) == tower
    fused = "language_model.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert global_name(fused, (3,)) == "language_model.decoder.layers.3.input_layernorm.weight"
    fused = "language_model.decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert global_name(fused, (3,)) == "language_model.decoder.layers.3.pre_mlp_layernorm.weight"
