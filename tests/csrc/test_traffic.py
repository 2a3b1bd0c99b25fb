"""Element-wise traffic of a block of the tower: the plan against the bytes of every operation that runs."""

from dataclasses import replace

import pytest

from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import PrecisionConfig
from megatron_vl.plan.kernels import kernels_of
from megatron_vl.plan.traffic import block_traffic
from tests.csrc.on_ranks import traffic_on_rank
from tests.fixtures.small import make_documents
from tests.model.on_ranks import run_of

MODEL = replace(
    STEP3_VL_TINY, vision=replace(STEP3_VL_TINY.vision, num_layers=1, hidden_size=96, ffn_hidden_size=448)
)


@pytest.mark.parametrize(
    ("fused", "views", "dtype"),
    [(False, 3, "bf16"), (True, 3, "bf16"), (False, 1, "fp32"), (True, 1, "fp32")],
)
def test_a_block(world, host_library, fused, views, dtype):
    docs = make_documents(MODEL, [([], 20)])
    config, _, _ = run_of(MODEL, "1", "data", docs, fused_kernels="required" if fused else "never")
    config = replace(config, precision=PrecisionConfig(params=dtype))
    (answer,) = world.run(1, traffic_on_rank, config, views, str(host_library))
    kernels = kernels_of("torch", {"bf16": 2, "fp32": 4}[dtype], on_cpu=True, fused=fused)
    patches = MODEL.vision.global_grid**2
    planned = block_traffic(MODEL.vision, patches, views, 1, kernels)
    for found, expected in zip(answer.values(), (planned.forward, planned.backward)):
        assert expected == pytest.approx(sum(found.values()), rel=0.03)
