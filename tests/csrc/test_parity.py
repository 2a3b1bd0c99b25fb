"""A model on the kernels' CPU form against its PyTorch form: loss and every gradient, whole and tensor-parallel."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.parity.compare import Assembled, relative
from tests.csrc.on_ranks import fused_gradients_on_rank
from tests.fixtures.small import SMALL, make_documents
from tests.model.on_ranks import gradients, run_of

FULL = RecomputeConfig(vision="full")
# layout, placement of the tower, recompute, pixels as bytes
CASES = [("1", "data", None, True), ("tp2sp", "tensor", None, False), ("1", "data", FULL, False)]
BLOCKS = SMALL.vision.num_layers
SIZES = 2  # towers passes of a micro-batch: crops and globals


def documents(as_bytes: bool):
    docs = make_documents(SMALL, [([(1, 2)], 30), ([(0, 0)], 20)])
    if not as_bytes:
        return docs
    return [
        replace(doc, pixels=[(p * 50 + 128).clamp(0, 255).to(torch.uint8) for p in doc.pixels])
        for doc in docs
    ]


@pytest.mark.parametrize(("layout", "placement", "recompute", "as_bytes"), CASES)
def test_loss_and_every_gradient(world, host_library, layout, placement, recompute, as_bytes):
    docs = documents(as_bytes)
    loss, expected = gradients(world, SMALL, layout, placement, docs, recompute=recompute)
    config, batches, place = run_of(
        SMALL, layout, placement, docs, recompute=recompute, fused_kernels="required"
    )
    answers = world.run(place.world_size, fused_gradients_on_rank, config, batches, str(host_library))
    seen = [answer for answer, _ in answers]
    assert seen[0].losses[0] == pytest.approx(loss, rel=1e-6)
    found = Assembled(seen, place, batches, docs, SMALL).gradients()
    assert found.keys() == expected.keys()
    worst = max(relative(found[name], expected[name]) for name in expected)
    assert 0 < worst < 2e-5, "equal to the bit would mean that the kernels did not run"
    for _, calls in answers:
        backward = calls["bias_quick_gelu_backward"]
        assert backward > 0 and backward % BLOCKS == 0
        for name in ("bias_quick_gelu", "rope_2d", "scale_residual", "scale_residual_norm"):
            assert calls[name] == backward * (2 if recompute else 1), calls
            assert calls[f"{name}_backward"] == backward, calls
        assert (calls["patchify"] > 0) == as_bytes
        assert calls["projector_fold_"] == 2 * backward // BLOCKS and calls["projector_gather"] > 0, calls
