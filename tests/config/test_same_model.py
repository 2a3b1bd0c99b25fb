"""Whose weights may be used for which model, as far as the rotary embedding is concerned."""

from dataclasses import replace

import pytest

from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.rope import RopeScaling
from megatron_vl.config.same_model import check_same_model, model_differences
from megatron_vl.errors import ConfigErrors

YARN = RopeScaling("yarn", None, 2.0, 65536)
THETA = RopeScaling("theta", 5e6)


def model(scaling=None, base=1e6):
    text = replace(STEP3_VL_TINY.text, rope_scaling=scaling or RopeScaling(), rotary_base=base)
    return replace(STEP3_VL_TINY, text=text)


def refused(theirs, ours, may_extend) -> list[str]:
    try:
        check_same_model(theirs, ours, "there", "change it", may_extend)
    except ConfigErrors as errors:
        return [problem.path for problem in errors.problems]
    return []


def test_another_base_by_either_key_is_the_same_model():
    assert list(model_differences(model(THETA), model(base=5e6))) == []
    assert list(model_differences(model(base=5e6), model(THETA))) == []


FIELDS = [
    f"model.text.rope_scaling.{name}" for name in ("kind", "factor", "original_max_position_embeddings")
]


@pytest.mark.parametrize(
    ("theirs", "ours", "resumed", "begun"),
    [
        (model(), model(YARN), FIELDS, []),
        (model(), model(THETA), ["model.text.rotary_base"], []),
        (model(YARN), model(), FIELDS, FIELDS),  # an extension is not dropped unnoticed
        (model(YARN), model(replace(YARN, factor=4.0)), ["model.text.rope_scaling.factor"], []),
        (model(base=5e6), model(YARN), ["model.text.rotary_base", *FIELDS], ["model.text.rotary_base", *FIELDS]),
        (model(THETA), model(base=5e6), [], []),
    ],
)  # fmt: skip
def test_a_run_goes_on_with_its_rope_and_a_new_one_may_extend_it(theirs, ours, resumed, begun):
    assert refused(theirs, ours, may_extend=False) == resumed
    assert refused(theirs, ours, may_extend=True) == begun
