"""Scores of rotated queries and keys through Megatron-Core's rotary embedding are those of transformers."""

import pytest
import torch

from megatron_vl.config.rope import RopeScaling
from megatron_vl.model.rope import extend_rope
from megatron_vl.plan.rope import attention_scale

LENGTH, CHANNELS, BASE = 96, 32, 1e4
YARN = RopeScaling("yarn", None, 4.0, 24, beta_fast=2.0, beta_slow=0.5)


def our_scores(queries: torch.Tensor, keys: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """``[S, S]`` before the softmax, from ``[S, d]``."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    rotary = RotaryEmbedding(CHANNELS, 1.0, rotary_base=BASE, use_cpu_initialization=True)
    extend_rope(rotary, CHANNELS, BASE, scaling)
    freqs = rotary.get_freqs_non_repeated(LENGTH)
    angles = torch.cat([freqs, freqs], dim=-1)[:, None, None]
    queries, keys = (_apply_rotary_pos_emb_bshd(x[:, None, None], angles)[:, 0, 0] for x in (queries, keys))
    return queries @ keys.T * attention_scale(CHANNELS, scaling)


@pytest.mark.parametrize("kind", ["none", "theta", "yarn"])
def test_scores_are_those_of_transformers(kind):
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    rope = {"rope_type": "default", "rope_theta": 5e5 if kind == "theta" else BASE}
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
        rope |= {"beta_fast": 2.0, "beta_slow": 0.5}
    config = qwen.Qwen3Config(hidden_size=64, num_attention_heads=2, head_dim=CHANNELS, rope_parameters=rope)
    generator = torch.Generator().manual_seed(1)
    queries, keys = (torch.randn(LENGTH, CHANNELS, generator=generator) for _ in range(2))
    cos, sin = qwen.Qwen3RotaryEmbedding(config)(queries[None], torch.arange(LENGTH)[None])
    q, k = qwen.apply_rotary_pos_emb(queries[None, None], keys[None, None], cos, sin)
    expected = (q @ k.transpose(2, 3))[0, 0] * CHANNELS**-0.5
    scaling = {"none": RopeScaling(), "theta": RopeScaling("theta", 5e5), "yarn": YARN}[kind]
    torch.testing.assert_close(our_scores(queries, keys, scaling), expected, rtol=1e-4, atol=2e-5)
    other = our_scores(queries, keys, YARN if kind == "none" else RopeScaling())
    assert (other - expected).abs().max() > 0.1, "this case cannot fail"
