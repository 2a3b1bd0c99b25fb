"""The work of a document is what the cost model says of it."""

from dataclasses import replace

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.plan.cost import sample_flops, train_flops
from megatron_vl.plan.row_work import WorkRates
from megatron_vl.plan.vision_share import CROP, GLOBAL


@pytest.mark.parametrize(
    "model", [ModelConfig(), STEP3_VL_TINY, replace(ModelConfig(), freeze_vision=True, freeze_projector=True)]
)
def test_rows_add_up_to_the_cost_model(model):
    rates, lengths = WorkRates.of(model), [7000, 1234, 1]
    kinds = [CROP] * 6 + [GLOBAL] * 2
    row = sum(rates.document(length, 0, 0) for length in lengths) + rates.vision(2, 6)
    row += sum(lengths) * rates.per_token
    assert row == pytest.approx(
        sum(train_flops(model, sample_flops(model, kinds, lengths)).values()), rel=1e-12
    )


def test_released_model():
    """The table of the tower: 34.9 TFLOP to train on a global view, 15.2 on a crop; 45.4 GFLOP per token."""
    rates = WorkRates.of(ModelConfig())
    assert rates.per_global / 1e12 == pytest.approx(34.9, abs=0.05)
    assert rates.per_crop / 1e12 == pytest.approx(15.15, abs=0.05)
    assert rates.per_token / 1e9 == pytest.approx(45.4, abs=0.05)
    # half of the square: 6 x layers x length x width per token
    assert rates.per_token_squared == 6 * 36 * 4096
