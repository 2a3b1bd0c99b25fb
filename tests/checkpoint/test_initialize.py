"""Fresh weights are a function of seed and name, equal in every layout."""

import math

import pytest
import torch

from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.checkpoint.initialize import FreshWeights
from tests.checkpoint.on_ranks import fresh_loss
from tests.fixtures.small import SMALL, make_documents
from tests.model.on_ranks import run_of


def test_values():
    fresh, again, other = FreshWeights(SMALL, 1), FreshWeights(SMALL, 1), FreshWeights(SMALL, 2)
    for name, shape in expected_tensors(SMALL).items():
        value = fresh(name)
        assert value.shape == shape and value.dtype == torch.float32 and torch.equal(value, again(name))
        if len(shape) > 1:
            assert not torch.equal(value, other(name))
        elif name.endswith("bias"):
            assert value.abs().max() == 0
        else:
            assert value.unique().tolist() == [pytest.approx(0.1 if name.endswith("gamma") else 1.0)]


def test_standard_deviations():
    fresh, text = FreshWeights(SMALL, 1), SMALL.text
    assert fresh("lm_head.weight").std().item() == pytest.approx(0.02, rel=0.05)
    assert fresh("model.layers.0.mlp.down_proj.weight").std().item() == pytest.approx(
        0.02 / math.sqrt(2 * text.num_layers), rel=0.1
    )
    conv = fresh("vision_model.conv1.weight")
    assert conv.std().item() == pytest.approx(1 / math.sqrt(3 * 14 * 14), rel=0.05)
    same_shape = [fresh(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)]
    assert not torch.equal(*same_shape)


def test_the_first_loss_is_equal_in_every_layout(world):
    docs = make_documents(SMALL, [([(1, 2)], 9), ([], 12)])
    losses = []
    for layout, placement in (("1", "data"), ("tp2pp2cp2sp", "tensor"), ("tp4sp", "data")):
        config, batches, place = run_of(SMALL, layout, placement, docs)
        answers = world.run(place.world_size, fresh_loss, config, batches, 3)
        assert len(set(answers)) == 1
        losses.append(answers[0])
    assert len({tokens for _, tokens in losses}) == 1
    assert [loss for loss, _ in losses] == pytest.approx([losses[0][0]] * 3, rel=1e-6)
    assert losses[0][0] == pytest.approx(math.log(SMALL.text.vocab_size), rel=0.05)
