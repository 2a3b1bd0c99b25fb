"""The plan of a model on the kernels' CPU form against the tensors that autograd saves there."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.config.schema import DataConfig, PrecisionConfig, RecomputeConfig
from megatron_vl.plan.kept import kept_by_chunk
from megatron_vl.plan.kernels import kernels_of_run
from megatron_vl.plan.stages import plan_stages
from tests.csrc.on_ranks import fused_kept_on_rank
from tests.fixtures.small import make_documents
from tests.model.on_ranks import run_of
from tests.plan.test_kept import MODEL, load_of

FULL = RecomputeConfig(vision="full", vision_num_layers=2)
CHUNKS = RecomputeConfig(vision_chunk_views=2)
FP8 = PrecisionConfig(params="bf16", fp8="tensorwise", fp8_vision=True)
BF16, FULL_PRECISION = PrecisionConfig(params="bf16"), PrecisionConfig(params="fp32")
# layout, placement, recompute, number formats, pixels as bytes
CASES = [
    ("1", "data", None, BF16, False),
    ("1", "data", None, FULL_PRECISION, True),
    ("tp2sp", "tensor", None, BF16, True),
    ("1", "data", FULL, BF16, False),
    ("1", "data", CHUNKS, BF16, True),
    ("1", "data", None, FP8, False),
]


def documents(as_bytes: bool):
    docs = make_documents(MODEL, [([(2, 2), (0, 0)], 60), ([(1, 3)], 140)])
    if not as_bytes:
        return docs
    return [
        replace(doc, pixels=[(p * 50 + 128).clamp(0, 255).to(torch.uint8) for p in doc.pixels])
        for doc in docs
    ]


@pytest.mark.parametrize(("name", "placement", "recompute", "precision", "as_bytes"), CASES)
def test_what_the_tower_keeps(world, host_library, name, placement, recompute, precision, as_bytes):
    config, batches, layout = run_of(
        MODEL, name, placement, documents(as_bytes), recompute=recompute, fused_kernels="required"
    )
    mode = "fast" if as_bytes else "exact"
    config = replace(config, precision=precision, data=DataConfig(image_mode=mode))
    batches = replace(batches, seq_length=-(-batches.seq_length // 16) * 16)
    stage = plan_stages(MODEL.text.num_layers, 1)[0][0]
    kernels = kernels_of_run(config, 4 if precision.params == "fp32" else 2, on_cpu=True)
    assert kernels.fused
    for kept, calls in world.run(layout.world_size, fused_kept_on_rank, config, batches, str(host_library)):
        load = load_of(batches, kept.coords.dp)
        assert calls["bias_quick_gelu"] and calls["rope_2d"] and calls["scale_residual_norm"]
        assert bool(calls["patchify"]) == as_bytes
        found = kept.chunks[0]["vision"]
        planned = kept_by_chunk(MODEL, layout, stage, kernels, load, config.recompute, kept.coords)["vision"]
        assert planned == pytest.approx(found, rel=0.02)
        twins = replace(kernels, fused=False)
        without = kept_by_chunk(MODEL, layout, stage, twins, load, config.recompute, kept.coords)["vision"]
        if not recompute:  # the twins keep more
            assert without > 1.05 * planned
