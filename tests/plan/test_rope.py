"""Frequencies of the extended rotary embedding against the definition, counted out, and the rules of its keys."""

import math

import pytest

from megatron_vl.config.rope import RopeScaling
from megatron_vl.plan.rope import attention_scale, check_rope_scaling, rope_frequencies

YARN = RopeScaling(kind="yarn", factor=2.0, original_max_position_embeddings=65536)
CASES = [
    (128, 1e6, YARN),
    (128, 1e6, RopeScaling("yarn", None, 4.0, 32768)),
    (128, 1e4, RopeScaling("yarn", None, 16.0, 4096, beta_fast=24.0, beta_slow=2.0)),
    (64, 1e4, RopeScaling("yarn", None, 8.0, 2048)),
    (16, 1e6, RopeScaling("yarn", None, 2.0, 64, beta_fast=40.0)),
]


def counted_out(channels: int, base: float, scaling: RopeScaling) -> list[float]:
    """Turns of every pair over the original length; the ramp lies between the pairs that pass the two bounds."""
    turns = [
        scaling.original_max_position_embeddings / (2 * math.pi * base ** (2 * i / channels))
        for i in range(2 * channels)
    ]
    kept = max([i for i, t in enumerate(turns) if t >= scaling.beta_fast], default=0)
    divided = min(i for i, t in enumerate(turns) if t <= scaling.beta_slow)
    divided = min(divided, channels - 1)
    found = []
    for i in range(channels // 2):
        plain = 1 / base ** (2 * i / channels)
        share = 0 if i <= kept else 1 if i >= divided else (i - kept) / (divided - kept)
        found.append((1 - share) * plain + share * plain / scaling.factor)
    return found


@pytest.mark.parametrize(("channels", "base", "scaling"), CASES)
def test_yarn_is_what_counting_turns_gives(channels, base, scaling):
    found = rope_frequencies(channels, base, scaling)
    assert found == pytest.approx(counted_out(channels, base, scaling), rel=1e-12)
    assert found[0] == 1.0 and found == sorted(found, reverse=True)


@pytest.mark.parametrize(("channels", "base", "scaling"), CASES)
def test_yarn_is_that_of_transformers(channels, base, scaling):
    """Also the factor of queries and keys; its numbers are fp32."""
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    rope = {"rope_type": "yarn", "rope_theta": base, "factor": scaling.factor}
    rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    config = qwen.Qwen3Config(
        hidden_size=4 * channels, num_attention_heads=4, head_dim=channels, rope_parameters=rope
    )
    theirs = qwen.Qwen3RotaryEmbedding(config)
    assert rope_frequencies(channels, base, scaling) == pytest.approx(theirs.inv_freq.tolist(), rel=1e-6)
    assert attention_scale(channels, scaling) == pytest.approx(theirs.attention_scaling**2 * channels**-0.5)


@pytest.mark.parametrize(("channels", "base", "scaling"), CASES)
def test_yarn_is_that_of_megatron(channels, base, scaling):
    yarn = pytest.importorskip("megatron.core.models.common.embeddings.yarn_rotary_pos_embedding")
    import torch

    low, high = yarn._yarn_find_correction_range(
        scaling.beta_fast, scaling.beta_slow, channels, base, scaling.original_max_position_embeddings
    )
    stretched = yarn._yarn_linear_ramp_mask(low, high, channels // 2, torch.device("cpu"))
    plain = base ** (-torch.arange(0, channels, 2).double() / channels)
    theirs = plain * (1 - stretched) + plain / scaling.factor * stretched
    assert rope_frequencies(channels, base, scaling) == pytest.approx(theirs.tolist(), rel=1e-6)
    factor = yarn._yarn_get_concentration_factor(scaling.factor, None, None)
    assert attention_scale(channels, scaling) == pytest.approx(factor**2 / math.sqrt(channels))


def test_without_scaling_and_with_another_base():
    plain = [1e6 ** (-i / 64) for i in range(64)]
    assert rope_frequencies(128, 1e6, RopeScaling()) == pytest.approx(plain, rel=1e-12)
    assert rope_frequencies(128, 1e4, RopeScaling("theta", 1e6)) == pytest.approx(plain, rel=1e-12)
    assert attention_scale(128, RopeScaling("theta", 1e6)) == attention_scale(128, RopeScaling())
    assert attention_scale(64, RopeScaling()) == 1 / 8


def test_the_released_model_doubled():
    """131,072 positions: fast pairs as they were, slow ones halved, some in between."""
    plain, doubled = rope_frequencies(128, 1e6, RopeScaling()), rope_frequencies(128, 1e6, YARN)
    ratios = [a / b for a, b in zip(doubled, plain)]
    assert ratios[:26] == [1.0] * 26 and ratios[-21:] == pytest.approx([0.5] * 21)
    assert all(0.5 < ratio < 1 for ratio in ratios[28:42])
    given = RopeScaling("yarn", None, 2.0, 65536, attention_factor=1.25)
    assert attention_scale(64, given) == 1.25**2 / 8


@pytest.mark.parametrize(
    ("scaling", "messages"),
    [
        (RopeScaling(), []),
        (YARN, []),
        (RopeScaling("theta", 5e6), []),
        (RopeScaling("theta"), ["is needed with kind = theta"]),
        (RopeScaling("none", 5e6), ["theta = 5000000.0: is not read with"]),
        (RopeScaling("theta", 5e6, factor=2.0), ["factor = 2.0: is not read with"]),
        (RopeScaling("yarn", 5e6, 2.0, 65536), ["theta = 5000000.0: is not read with"]),
        (RopeScaling("yarn"), ["is needed with kind = yarn", "must be greater than 1"]),
        (RopeScaling("yarn", None, 2.0, 65536, 1.0, 1.0), ["must be greater than beta_slow = 1.0"]),
    ],
)
def test_rules_of_the_keys(scaling, messages):
    found = [str(problem) for problem in check_rope_scaling(scaling)]
    assert len(found) == len(messages) and all(m in f for m, f in zip(messages, found))
    assert all(f.startswith("model.text.rope_scaling.") for f in found)
