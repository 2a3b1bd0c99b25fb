"""Activations of whole training steps: the plan's sum over what is in flight, against the most that autograd held."""

from dataclasses import replace

import pytest

from megatron_vl.config.schema import PrecisionConfig, RecomputeConfig, TrainConfig
from megatron_vl.plan.kept import layer_kept
from megatron_vl.plan.memory import memory_of_stage, setting_of
from megatron_vl.plan.stages import held_stages
from tests.fixtures.small import make_documents
from tests.model.on_ranks import run_of
from tests.plan.on_ranks import peak_of_step
from tests.plan.test_kept import MODEL, load_of

NONE = RecomputeConfig()
FULL = RecomputeConfig(decoder="full", vision="full")
CHUNKS = RecomputeConfig(vision_chunk_views=1)
# layout, placement, recompute, number format, micro-batches of a replica
QUICK = [
    ("pp4", "data", NONE, "fp32", 6),
    ("dp2tp2pp2", "tensor", NONE, "bf16", 3),
    ("pp2", "all", NONE, "fp32", 3),
    ("pp2", "data", FULL, "fp32", 3),
]
SLOW = [
    ("1", "data", NONE, "bf16", 2),
    ("tp2sp", "data", NONE, "fp32", 1),
    ("cp2", "data", NONE, "bf16", 2),
    ("pp2vpp2", "data", NONE, "fp32", 4),
    ("pp2cp2", "data", NONE, "fp32", 2),
    ("tp2pp2", "all", CHUNKS, "fp32", 2),
    ("1", "data", CHUNKS, "fp32", 1),
    ("dp2tp2", "data", FULL, "bf16", 2),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("name", "placement", "recompute", "dtype", "count"), CASES)
def test_the_most_that_is_held(world, name, placement, recompute, dtype, count):
    """Of each stage the fullest rank."""
    dp = 2 if "dp2" in name else 1
    docs = make_documents(MODEL, [([(2, 2), (0, 0)], 120)] * (count * dp))
    config, batches, layout = run_of(MODEL, name, placement, docs, recompute=recompute)
    train = TrainConfig(micro_batch_size=1, global_batch_size=count * dp)
    config = replace(config, precision=PrecisionConfig(params=dtype), train=train)
    setting = setting_of(config, layout, load_of(batches, 0), {"fp32": 4, "bf16": 2}[dtype], on_cpu=True)
    stages = held_stages(MODEL.text.num_layers, layout)
    found: dict[int, int] = {}
    for coords, most, left in world.run(layout.world_size, peak_of_step, config, batches):
        assert left == 0, coords
        found[coords.pp] = max(found.get(coords.pp, 0), most)
    for pp, most in found.items():
        parts = memory_of_stage(setting, layout, stages[pp])
        again = recompute.decoder == "full"
        one = layer_kept(MODEL.text, layout, setting.kernels, setting.load, False) if again else 0
        # the loss's are gone when a layer is computed again
        planned = parts["tower"] + parts["decoder"] + max(parts["loss"], one)
        assert planned == pytest.approx(most, rel=0.04 if again else 0.005), pp
        assert planned + parts["workspace"] >= most
