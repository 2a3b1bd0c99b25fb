"""The FLOP count of log, planner and benchmark against what PyTorch counts while the model runs, within 1%.

The formula (`plan/cost.py`): 2 m n k for every product; attention 4 s^2 d per head in the tower and, being causal, half
of that in the decoder. PyTorch's counter takes causal attention as full, so the decoder's is doubled before it is
compared. A training step is three times the forward pass of every part; the chunked loss computes the head's product
once more, which is not counted as work of the model.
"""

from dataclasses import replace

import pytest

from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import DataConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_vl.plan.cost import TOWER_PARTS, sample_flops, view_flops
from megatron_vl.plan.vision_share import CROP, GLOBAL
from tests.bench.on_ranks import flops_on_rank

WIDER = replace(
    STEP3_VL_TINY,
    vision=replace(STEP3_VL_TINY.vision, hidden_size=96, num_layers=5, num_attention_heads=6, ffn_hidden_size=512),
    text=replace(
        STEP3_VL_TINY.text, hidden_size=96, num_attention_heads=6, num_query_groups=3, kv_channels=16,
        ffn_hidden_size=384, vocab_size=1000,
    ),
)  # fmt: skip
OTHER_GRIDS = replace(
    STEP3_VL_TINY, vision=replace(STEP3_VL_TINY.vision, image_size=182, crop_size=126, num_layers=8)
)


def run_of(model, tokens: int, rows: int) -> RunConfig:
    return RunConfig(
        model=model, parallel=ParallelConfig(device="cpu"), data=DataConfig(seq_length=tokens),
        train=TrainConfig(micro_batch_size=rows, global_batch_size=rows),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "tokens", "rows"), [(STEP3_VL_TINY, 128, 2), (WIDER, 256, 1), (OTHER_GRIDS, 320, 1)]
)
def test_the_count_is_pytorchs(world, model, tokens, rows):
    found = world.run(1, flops_on_rank, run_of(model, tokens, rows))[0]
    views = 0
    for name, kind in (("crop", CROP), ("global", GLOBAL)):
        expected, count = view_flops(model, kind), found[f"{name}_views"]
        tower = sum(expected[part] for part in TOWER_PARTS if part != "projector")
        assert found[f"{name}_tower"] == pytest.approx(count * tower, rel=0.01)
        assert found[f"{name}_projector"] == pytest.approx(count * expected["projector"], rel=0.01)
        views += count * sum(expected.values())
    text = sample_flops(model, [], [tokens] * rows)
    decoder = text["decoder_linear"] + 2 * text["decoder_attention"]
    assert views and found["decoder_and_views"] - views == pytest.approx(decoder, rel=0.01)
    assert found["head"] == pytest.approx(text["lm_head"], rel=0.01)


@pytest.mark.parametrize(("model", "tokens"), [(WIDER, 512), (OTHER_GRIDS, 320)])
def test_a_step_is_three_forward_passes(world, model, tokens):
    """Attention's backward pass is counted as PyTorch does, 2.5 times the forward: it computes the scores again."""
    found = world.run(1, flops_on_rank, run_of(model, tokens, 1))[0]
    kinds = [CROP] * found["crop_views"] + [GLOBAL] * found["global_views"]
    parts = sample_flops(model, kinds, [tokens])
    again = 0.5 * (parts["vision_attention"] + 2 * parts["decoder_attention"])
    no_pixels = parts["patch_embed"]  # nobody wants the pixels' gradient
    forward = sum(parts.values()) + parts["decoder_attention"]
    scored = 1 - visual_tokens(model, kinds) / tokens
    head = parts["lm_head"] * (1 - 4 * scored / 3) * 3  # of scored tokens only, and once more
    assert found["step"] == pytest.approx(3 * forward + again - no_pixels - head, rel=0.01)


def visual_tokens(model, kinds) -> int:
    vision = model.vision
    return kinds.count(CROP) * vision.crop_tokens + kinds.count(GLOBAL) * vision.global_tokens
