"""How errors are shown."""

import pytest

from megatron_vl.errors import (
    ConfigError,
    ConfigErrors,
    DataError,
    ImageRefused,
    MegatronVLError,
    Problem,
    raise_if_any,
)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "none"),
        (True, "true"),
        (0, "0"),
        (1, "1"),
        (1e-5, "1e-05"),
        ("cpu", "cpu"),
        ("", "''"),
        ([1, 2], "[1, 2]"),
        ("x" * 200, "x" * 117 + "..."),
    ],
)
def test_values_are_shown_as_typed(value, shown):
    assert str(Problem("a.b", value, "must not be", "remove it")) == f"a.b = {shown}: must not be; remove it"


def test_a_problem_without_a_value():
    problem = Problem("a.b", None, "is required", "add it", show_value=False)
    assert str(problem) == "a.b: is required; add it"


def test_all_problems_are_in_the_message():
    problems = [Problem("a", 1, "is odd", "add 1"), Problem("b", 2, "is even", "add 1")]
    with pytest.raises(ConfigErrors) as caught:
        raise_if_any(problems)
    assert caught.value.problems == problems
    assert str(caught.value).splitlines() == [
        "2 problems in the configuration:",
        "  a = 1: is odd; add 1",
        "  b = 2: is even; add 1",
    ]
    assert isinstance(caught.value, ConfigError) and isinstance(caught.value, MegatronVLError)
    raise_if_any([])


def test_a_refused_image_has_a_reason():
    error = ImageRefused("truncated", "a.jpg ends after 12 bytes")
    assert (error.reason, error.detail) == ("truncated", "a.jpg ends after 12 bytes")
    assert str(error) == "truncated: a.jpg ends after 12 bytes" and isinstance(error, DataError)
