"""Memory of a mid-size model in fourteen layouts: the plan against ranks that are built, and against a whole step.

Views have their real sizes, 728 and 504, heads their real width of 64 and 128; about 44 M parameters.
"""

from dataclasses import replace

import pytest

from megatron_vl.config.model import ModelConfig, TextConfig, VisionConfig
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import PrecisionConfig, RecomputeConfig
from megatron_vl.plan.kept import kept_by_chunk
from megatron_vl.plan.kernels import kernels_of
from megatron_vl.plan.overlap import bucket_elements
from megatron_vl.plan.stages import held_stages
from megatron_vl.plan.state_bytes import bytes_of_rank
from tests.fixtures.small import make_documents
from tests.model.on_ranks import run_of
from tests.plan.on_ranks import held_and_kept
from tests.plan.test_kept import load_of

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=728, crop_size=504, patch_size=14, hidden_size=256, num_layers=6, num_attention_heads=4,
        ffn_hidden_size=1024,
    ),
    text=TextConfig(
        hidden_size=512, num_layers=8, num_attention_heads=4, num_query_groups=2, kv_channels=128,
        ffn_hidden_size=1408, vocab_size=8192,
    ),
    tokens=STEP3_VL_TINY.tokens,
)  # fmt: skip
NONE = RecomputeConfig()
FULL = RecomputeConfig(decoder="full", vision="full")
CHUNKS = RecomputeConfig(vision="full", vision_chunk_views=1)

# layout, placement, packed, recompute, number format
CASES = [
    ("1", "data", False, NONE, "bf16"),
    ("tp2sp", "tensor", False, NONE, "fp32"),
    ("pp4", "data", False, NONE, "fp32"),
    ("cp2tp2sp", "data", True, NONE, "bf16"),
    ("dp2", "data", False, CHUNKS, "fp32"),
    ("dp2tp2pp2", "data", False, NONE, "bf16"),
    ("tp2", "data", False, FULL, "fp32"),
    ("pp2vpp2", "data", False, NONE, "bf16"),
    ("cp4", "data", True, NONE, "fp32"),
    ("tp2pp2", "tensor", False, FULL, "bf16"),
    ("pp2cp2", "data", False, NONE, "fp32"),
    ("dp2cp2", "data", True, FULL, "bf16"),
    ("cp2agtp2sp", "tensor", False, NONE, "bf16"),
    ("dp2pp2", "data", False, NONE, "fp32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "placement", "packed", "recompute", "dtype"), CASES)
def test_live_bytes(world, name, placement, packed, recompute, dtype):
    """Every rank: states to the byte; activations of every chunk within 3% by part (small parts within 8 kB)."""
    docs = make_documents(MODEL, [([(1, 1)], 200), ([], 90)] + [([(1, 1)], 200)] * ("dp2" in name), seed=7)
    docs = docs if packed else [docs[0], docs[-1 if "dp2" in name else 0]]
    config, batches, layout = run_of(MODEL, name, placement, docs, packed=packed, recompute=recompute)
    config = replace(config, precision=PrecisionConfig(params=dtype))
    size = {"fp32": 4, "bf16": 2}[dtype]
    kernels = kernels_of("torch", size, on_cpu=True, exchange=config.parallel.cp_comm_type)
    bucket = bucket_elements(config.parallel, layout.dp * layout.cp, on_cpu=True)
    stages = held_stages(MODEL.text.num_layers, layout)
    for held, live in world.run(layout.world_size, held_and_kept, config, batches):
        here = stages[held.coords.pp]
        told = bytes_of_rank(MODEL, layout, here, held.coords, size, True, bucket)
        assert (told.weights, told.gradients, told.optimizer) == (
            held.weight_bytes, held.gradient_bytes, held.optimizer_bytes,
        )  # fmt: skip
        load = load_of(batches, held.coords.dp)
        for stage, found in zip(here, live.chunks):
            planned = kept_by_chunk(MODEL, layout, stage, kernels, load, recompute, held.coords)
            for part, measured in found.items():
                assert planned[part] == pytest.approx(measured, rel=0.03, abs=8000), (held.coords, part)
