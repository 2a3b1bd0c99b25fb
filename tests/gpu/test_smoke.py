"""First smoke on one GPU: parity in fp32 and bf16, one step of a full-width one-layer model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vl.config.presets import STEP3_VL_10B
from megatron_vl.config.schema import DataConfig, ParallelConfig, RecomputeConfig, RunConfig
from megatron_vl.parallel.world import LocalWorld
from megatron_vl.parity.check import check_all, make_cases, make_setting, parser

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_a"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parity_on_cuda(dtype: str):
    arguments = ["--hf", str(GOLDEN), "--reference", str(GOLDEN / "reference.safetensors"), "--dtype", dtype]
    setting = make_setting(parser().parse_args(arguments))
    rows = list(check_all(setting, make_cases("1", "data,tensor", "dense,packed", "cuda"), "cuda"))
    assert [(row.status, row.rule) for row in rows] == [("ok", "")] * 4


def full_width_step(config: RunConfig) -> tuple[float, float, int]:
    """One AdamW step of one 728 view with a crop and 256 tokens at the released widths."""
    import torch

    from megatron_vl.checkpoint.initialize import FreshWeights
    from megatron_vl.data.batch import Row, collate
    from megatron_vl.parallel.runtime import choose_device, start
    from megatron_vl.train.build import build
    from megatron_vl.train.step import train_step

    runtime = start(config.parallel, 1, choose_device("cuda"))
    parts = build(config, runtime, FreshWeights(config.model, 1))
    tokens = config.model.tokens
    image = [tokens.patch_start, *[tokens.im_patch] * 81, tokens.patch_end]
    image += [tokens.im_start, *[tokens.im_patch] * 169, tokens.im_end]
    ids = np.array([*image, *range(100, 180)], dtype=np.int64)
    labels = np.where(np.arange(len(ids)) >= len(image), ids, -100)
    batch = collate([Row("one", ids, labels, (0, 1))], config.data.seq_length, tokens.endoftext)
    generator = torch.Generator().manual_seed(0)
    batch = replace(
        batch,
        crop_pixels=torch.randn(1, 3, 504, 504, generator=generator),
        global_pixels=torch.randn(1, 3, 728, 728, generator=generator),
    )
    result = train_step(parts, [batch], 1e-5)
    return result.loss, result.grad_norm, torch.cuda.max_memory_allocated()


def test_one_step_at_full_width():
    """10B widths with one tower block and one decoder layer: about 1.7 B parameters."""
    model = STEP3_VL_10B
    model = replace(model, vision=replace(model.vision, num_layers=1), text=replace(model.text, num_layers=1))
    config = RunConfig(
        model=model, parallel=ParallelConfig(device="cuda"), data=DataConfig(seq_length=512),
        recompute=RecomputeConfig(vision="full"),
    )  # fmt: skip
    with LocalWorld(1, "cuda") as world:
        loss, norm, memory = world.run(1, full_width_step, config)[0]
    assert math.isfinite(norm) and norm > 0
    assert loss == pytest.approx(math.log(model.text.vocab_size), rel=0.2)
    print(f"full-width step: loss {loss:.3f}, grad norm {norm:.3f}, peak {memory / 2**30:.1f} GiB")
