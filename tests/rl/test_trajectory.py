"""What may be trained on: rewards per token, masked and contradictory trajectories, weight versions."""

from dataclasses import replace

import pytest

from megatron_vl.errors import DataError
from megatron_vl.rl.trajectory import check_versions, stale, usable
from tests.rl.made import VERSION, make_trajectories

MADE = make_trajectories()


def response(trajectory, **changes):
    return replace(trajectory, response=replace(trajectory.response, **changes))


def test_the_reward_comes_with_the_last_token():
    assert MADE[3].rewards() == [0.0] * 7 + [MADE[3].reward]
    per_token = replace(MADE[3], token_rewards=tuple(range(8)))
    assert per_token.rewards() == [0, 1, 2, 3, 4, 5, 6, 7 + MADE[3].reward]


def test_a_response_that_was_cut_gets_nothing_for_its_end():
    assert MADE[2].truncated and MADE[2].reward > 0 and MADE[2].rewards() == [0.0]
    assert replace(MADE[2], token_rewards=(0.5,)).rewards() == [0.5]


def test_masked_trajectories_are_left_out():
    masked = [
        replace(t, masked=n in (1, 4), reward=float("nan") if n == 1 else 0) for n, t in enumerate(MADE)
    ]
    assert [t.name for t in usable(masked)] == [t.name for n, t in enumerate(MADE) if n not in (1, 4)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (response(MADE[0], tokens=(), logprobs=()), "p0/0: [0-9]+ prompt and 0 response tokens"),
        (response(MADE[0], logprobs=(0.0,)), "p0/0: 1 log-probabilities for 7 response tokens"),
        (replace(MADE[0], token_rewards=(1.0, 2.0)), "p0/0: 2 token rewards for 7 response tokens"),
        (replace(MADE[0], reward=float("nan")), "p0/0: a reward or log-probability that is not finite"),
        (response(MADE[0], prompt_id="other"), "other/0: stands with prompt p0"),
        (MADE[1], "p1/0: is there twice"),
    ],
)
def test_contradictions_are_refused_by_name(changed, message):
    with pytest.raises(DataError, match=f"1 trajectories cannot be trained on: {message}"):
        usable([changed, *MADE[1:]])


def test_a_sample_of_other_weights_is_refused_by_name():
    check_versions(MADE, VERSION)
    mixed = [*MADE[:5], response(MADE[5], weight_version="weights-0"), *MADE[6:]]
    assert [t.name for t in stale(mixed, VERSION)] == ["p5/0"]
    with pytest.raises(DataError, match=r"1 of 10 trajectories .* weights-1 .*: p5/0 by weights-0; sample"):
        check_versions(mixed, VERSION)
