"""The released description of an extended rotary embedding, read and written."""

import pytest

from megatron_vl.config.rope import RopeScaling, rope_scaling_from_hf, rope_scaling_to_hf

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536}


def read(text, max_positions=65536):
    problems = []
    return rope_scaling_from_hf(text, max_positions, problems), [str(problem) for problem in problems]


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_scaling": {"type": "default"}},
    ],
)
def test_no_scaling(text):
    assert read(text) == (RopeScaling(), [])


@pytest.mark.parametrize(
    "text",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 65536}},
        {"rope_parameters": YARN | {"rope_theta": 1e6}},
        {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 1e6}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},  # transformers takes max_position_embeddings
        {"rope_scaling": YARN | {"truncate": True, "partial_rotary_factor": 1.0, "beta_fast": None}},
    ],
)
def test_the_forms_that_mean_the_same(text):
    expected = RopeScaling(kind="yarn", factor=2.0, original_max_position_embeddings=65536)
    assert read(text) == (expected, [])


def test_a_missing_factor_is_the_ratio_of_the_lengths():
    found, problems = read(
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32768}}, 131072
    )
    assert (found.factor, problems) == (4.0, [])


def test_mscale_is_an_attention_factor():
    found, _ = read({"rope_scaling": YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0}})
    assert found.attention_factor == pytest.approx((0.0707 * 3.688879454 + 1) / (0.1 * 3.688879454 + 1))
    found, _ = read(
        {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0, "attention_factor": 1.5}}
    )
    assert found.attention_factor == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            'only "default" and "yarn" are implemented',
        ),
        ({"rope_scaling": [1]}, "text_config.rope_scaling = [1]: must be an object"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate = false: only true is implemented"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5: only 1.0"),
        ({"rope_scaling": YARN | {"short_factor": [1]}}, "is no field of YaRN"),
        ({"rope_scaling": {"type": "yarn"}}, "text_config.rope_scaling.factor = none: YaRN needs a factor"),
        ({"rope_parameters": YARN | {"factor": 1.0}}, "text_config.rope_parameters.factor = 1.0: YaRN needs"),
        ({"rope_scaling": YARN | {"factor": "two"}}, "text_config.rope_scaling.factor"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "must be at least 1"),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 4.0}},
            "differs from text_config.rope_scaling",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(text, message):
    _, problems = read(text)
    assert len(problems) == 1 and message in problems[0]


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(),
        RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32768),
        RopeScaling("yarn", None, 2.0, 65536, beta_fast=24.0, beta_slow=2.0, attention_factor=1.2),
    ],
)
def test_written_and_read_again(scaling):
    written = rope_scaling_to_hf(1e6, scaling)
    assert written["rope_theta"] == 1e6 and read(written) == (scaling, [])


def test_another_base_is_written_as_the_base():
    assert rope_scaling_to_hf(1e6, RopeScaling("theta", 5e6)) == {"rope_theta": 5e6, "rope_scaling": None}
