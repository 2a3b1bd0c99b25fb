"""Model descriptions that can be named in a run: `preset: step3_vl_10b` or `preset: step3_vl_tiny`."""

from __future__ import annotations

from megatron_vl.config.model import ModelConfig, SpecialTokens, TextConfig, VisionConfig

STEP3_VL_10B = ModelConfig()

# Small enough to learn on a laptop's CPU within minutes; every dimension halves, so that TP2 x PP2 is legal.
STEP3_VL_TINY = ModelConfig(
    vision=VisionConfig(
        image_size=112,
        crop_size=56,
        patch_size=14,
        hidden_size=64,
        num_layers=3,
        num_attention_heads=4,
        ffn_hidden_size=176,
    ),
    text=TextConfig(
        hidden_size=128,
        num_layers=4,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        ffn_hidden_size=256,
        vocab_size=512,
    ),
    tokens=SpecialTokens(
        endoftext=490,
        chat_start=491,
        chat_end=492,
        think_start=495,
        think_end=496,
        im_patch=500,
        im_start=501,
        im_end=502,
        patch_start=506,
        patch_end=507,
        patch_newline=508,
    ),
)

PRESETS: dict[str, ModelConfig] = {"step3_vl_10b": STEP3_VL_10B, "step3_vl_tiny": STEP3_VL_TINY}
