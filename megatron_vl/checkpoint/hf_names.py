"""THE table between our parameter names and the released Hugging Face names, and what lies between the two.

Import, export, verification, initialisation and weight sync read it. A rule names one parameter of ours (decoder
layers by their global index), the released tensors that it is made of, how they are put together, and along which
axis tensor parallelism shards the result. Names and shapes: spec/model.md section 6.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vl.config.model import ModelConfig

VISION, PROJECTOR, DECODER = "vision", "projector", "decoder"
VALUE_HEAD = "value_head.weight"  # of a critic: in no released checkpoint


@dataclass(frozen=True)
class Rule:
    """ours: our name. hf: (released name, shape) pairs. kind: how they become one tensor.

    kinds: ``copy``; ``rows`` (the released tensor flattened behind its first axis); ``qkv`` (q, k, v interleaved by
    key-value group); ``stacked_qkv`` (one tensor of three equal blocks, interleaved by head); ``gate_up`` (two
    tensors on top of each other, each sharded by itself). axis: sharded axis of ours, None = replicated.
    padded: the first axis is a vocabulary, padded to a multiple of TP. part: vision, projector or decoder.
    """

    ours: str
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    kind: str
    axis: int | None
    part: str
    padded: bool = False


def all_rules(model: ModelConfig) -> list[Rule]:
    """Every parameter of the model, tower first."""
    return [*_vision_rules(model), *_decoder_rules(model)]


def value_head_rule(model: ModelConfig) -> Rule:
    """The weight that a critic has instead of ``lm_head.weight``, whole on every rank."""
    return Rule(VALUE_HEAD, ((VALUE_HEAD, (1, model.text.hidden_size)),), "copy", None, DECODER)


def rules_by_name(model: ModelConfig) -> dict[str, Rule]:
    """The rule of every parameter that a model or a critic may have, by our name."""
    return {rule.ours: rule for rule in (*all_rules(model), value_head_rule(model))}


def expected_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Released names and shapes of a whole checkpoint (1,066 for the 10B model)."""
    return {name: shape for rule in all_rules(model) for name, shape in rule.hf}


def _vision_rules(model: ModelConfig) -> list[Rule]:
    v = model.vision
    w, f, p = v.hidden_size, v.ffn_hidden_size, v.patch_size
    rules: list[Rule] = []

    def add(ours: str, hf: str, shape: tuple[int, ...], axis: int | None = None, kind: str = "copy") -> None:
        rules.append(Rule(f"vision_model.{ours}", ((f"vision_model.{hf}", shape),), kind, axis, VISION))

    add("conv1.weight", "conv1.weight", (w, 3, p, p), 0, "rows")
    add("positional_embedding", "positional_embedding", (v.global_grid**2, w))
    for end in ("weight", "bias"):
        add(f"ln_pre.{end}", f"ln_pre.{end}", (w,))
    for i in range(v.num_layers):
        a, b = f"transformer.layers.{i}", f"transformer.resblocks.{i}"
        for end in ("weight", "bias"):
            add(f"{a}.input_layernorm.{end}", f"{b}.ln_1.{end}", (w,))
            add(f"{a}.pre_mlp_layernorm.{end}", f"{b}.ln_2.{end}", (w,))
        add(f"{a}.self_attention.linear_qkv.weight", f"{b}.attn.in_proj_weight", (3 * w, w), 0, "stacked_qkv")
        add(f"{a}.self_attention.linear_qkv.bias", f"{b}.attn.in_proj_bias", (3 * w,), 0, "stacked_qkv")
        add(f"{a}.self_attention.linear_proj.weight", f"{b}.attn.out_proj.weight", (w, w), 1)
        add(f"{a}.self_attention.linear_proj.bias", f"{b}.attn.out_proj.bias", (w,))
        add(f"{a}.self_attn_bda.gamma", f"{b}.ls_1.gamma", (w,))
        add(f"{a}.mlp_bda.gamma", f"{b}.ls_2.gamma", (w,))
        add(f"{a}.mlp.linear_fc1.weight", f"{b}.mlp.c_fc.weight", (f, w), 0)
        add(f"{a}.mlp.linear_fc1.bias", f"{b}.mlp.c_fc.bias", (f,), 0)
        add(f"{a}.mlp.linear_fc2.weight", f"{b}.mlp.c_proj.weight", (w, f), 1)
        add(f"{a}.mlp.linear_fc2.bias", f"{b}.mlp.c_proj.bias", (w,))
    add("vit_downsampler1.weight", "vit_downsampler1.weight", (2 * w, w, 3, 3), 0, "rows")
    add("vit_downsampler1.bias", "vit_downsampler1.bias", (2 * w,), 0)
    add("vit_downsampler2.weight", "vit_downsampler2.weight", (4 * w, 2 * w, 3, 3), 1, "rows")
    add("vit_downsampler2.bias", "vit_downsampler2.bias", (4 * w,))
    shape = (model.text.hidden_size, 4 * w)
    rules.append(
        Rule("projector.linear.weight", (("vit_large_projector.weight", shape),), "copy", 0, PROJECTOR)
    )
    return rules


def _decoder_rules(model: ModelConfig) -> list[Rule]:
    t = model.text
    h, f, d = t.hidden_size, t.ffn_hidden_size, t.kv_channels
    q, kv = t.num_attention_heads * d, t.num_query_groups * d
    rules: list[Rule] = []

    def add(
        ours: str, hf: Sequence[tuple[str, tuple[int, ...]]], axis=None, kind="copy", padded=False
    ) -> None:
        rules.append(Rule(f"language_model.{ours}", tuple(hf), kind, axis, DECODER, padded))

    embed = ("model.embed_tokens.weight", (t.vocab_size, h))
    add("embedding.word_embeddings.weight", [embed], 0, padded=True)
    for i in range(t.num_layers):
        a, b = f"decoder.layers.{i}", f"model.layers.{i}"
        qkv = [(f"{b}.self_attn.{n}_proj.weight", (size, h)) for n, size in (("q", q), ("k", kv), ("v", kv))]
        add(f"{a}.input_layernorm.weight", [(f"{b}.input_layernorm.weight", (h,))])
        add(f"{a}.self_attention.linear_qkv.weight", qkv, 0, "qkv")
        add(f"{a}.self_attention.q_layernorm.weight", [(f"{b}.self_attn.q_norm.weight", (d,))])
        add(f"{a}.self_attention.k_layernorm.weight", [(f"{b}.self_attn.k_norm.weight", (d,))])
        add(f"{a}.self_attention.linear_proj.weight", [(f"{b}.self_attn.o_proj.weight", (h, q))], 1)
        add(f"{a}.pre_mlp_layernorm.weight", [(f"{b}.post_attention_layernorm.weight", (h,))])
        gate_up = [(f"{b}.mlp.{n}_proj.weight", (f, h)) for n in ("gate", "up")]
        add(f"{a}.mlp.linear_fc1.weight", gate_up, 0, "gate_up")
        add(f"{a}.mlp.linear_fc2.weight", [(f"{b}.mlp.down_proj.weight", (h, f))], 1)
    add("decoder.final_layernorm.weight", [("model.norm.weight", (h,))])
    add("output_layer.weight", [("lm_head.weight", (t.vocab_size, h))], 0, padded=True)
    return rules


def global_name(local: str, layers: Sequence[int]) -> str:
    """Our name of a parameter of a stage, with the decoder layer's global index.

    local: name inside the stage's module, with or without wrappers' ``module.``. layers: global indices of the
    stage's layers. Transformer Engine's fused norm + linear keeps the norm under the linear's name.
    """
    name = local.removeprefix("module.").removeprefix("module.")
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")

    def to_global(match: re.Match) -> str:
        return f"language_model.decoder.layers.{layers[int(match.group(1))]}."

    return re.sub(r"^language_model\.decoder\.layers\.(\d+)\.", to_global, name)


def to_ours(rule: Rule, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """The whole (unsharded) parameter of ours from released tensors."""
    if rule.kind == "copy":
        return tensors[0]
    if rule.kind == "rows":
        return tensors[0].reshape(tensors[0].shape[0], -1)
    if rule.kind == "gate_up":
        return torch.cat(list(tensors))
    groups, tensors = _qkv_blocks(rule, tensors, model)
    per_group = [t.reshape(groups, -1, *t.shape[1:]) for t in tensors]
    return torch.cat(per_group, dim=1).flatten(0, 1)


def to_hf(rule: Rule, whole: torch.Tensor, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Released tensors from the whole parameter of ours; the inverse of ``to_ours``."""
    names, shapes = [n for n, _ in rule.hf], [s for _, s in rule.hf]
    if rule.kind in ("copy", "rows"):
        return {names[0]: whole.reshape(shapes[0])}
    if rule.kind == "gate_up":
        return dict(zip(names, whole.chunk(2)))
    if rule.kind == "stacked_qkv":
        groups, sizes = model.vision.num_attention_heads, [model.vision.head_dim] * 3
    else:
        t = model.text
        groups, sizes = t.num_query_groups, [s[0] // t.num_query_groups for s in shapes]
    parts = whole.reshape(groups, -1, *whole.shape[1:]).split(sizes, dim=1)
    blocks = [part.flatten(0, 1) for part in parts]
    return {names[0]: torch.cat(blocks)} if rule.kind == "stacked_qkv" else dict(zip(names, blocks))


def _qkv_blocks(
    rule: Rule, tensors: Sequence[torch.Tensor], model: ModelConfig
) -> tuple[int, list[torch.Tensor]]:
    if rule.kind == "stacked_qkv":
        return model.vision.num_attention_heads, list(tensors[0].chunk(3))
    assert rule.kind == "qkv", rule.kind
    return model.text.num_query_groups, list(tensors)


def shard(rule: Rule, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """What tensor-parallel ``rank`` of ``size`` holds of the whole parameter."""
    if rule.axis is None or size == 1:
        return whole
    if rule.padded and whole.shape[0] % size:
        extra = -whole.shape[0] % size
        whole = torch.cat([whole, whole.new_zeros((extra, *whole.shape[1:]))])
    if rule.kind == "gate_up":
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim=rule.axis)[rank]


def unshard(rule: Rule, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole parameter from the shards of all tensor-parallel ranks; the inverse of ``shard``."""
    if rule.axis is None or len(shards) == 1:
        return shards[0]
    if rule.kind == "gate_up":
        halves = [s.chunk(2) for s in shards]
        return torch.cat([torch.cat([h[i] for h in halves]) for i in (0, 1)])
    whole = torch.cat(list(shards), dim=rule.axis)
    return whole[: rule.hf[0][1][0]] if rule.padded else whole
