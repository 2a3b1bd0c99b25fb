"""Keys of `rl` that contradict each other, with the exact message of each."""

import pytest

from megatron_vl.config.load import load_run
from megatron_vl.errors import ConfigErrors
from megatron_vl.plan.checks import load_checked_run
from megatron_vl.plan.rl_checks import check_ready_for_rl, check_rl

BAD = {
    "rl.ppo.strict_on_policy=true rl.critic.updates=1": [
        "rl.ppo.mini_batches = 4: rl.ppo.strict_on_policy takes one step per iteration; set it 1",
        "rl.ppo.ratio_mode = old_logprob: rl.ppo.strict_on_policy compares the policy with itself; set it detached",
    ],
    "rl.ppo.strict_on_policy=true rl.ppo.mini_batches=1 rl.ppo.ratio_mode=detached rl.ppo.dual_clip=3": [
        "rl.ppo.dual_clip = 3.0: rl.ppo.strict_on_policy never clips a ratio; set it none",
    ],
    "rl.critic.updates=6": [
        "rl.critic.updates = 6: must be a multiple or a divisor of rl.ppo.mini_batches = 4: both cut the same rows; "
        "choose 4, or a multiple of it",
    ],
    "rl.rollout.prompts_per_iteration=1 rl.rollout.samples_per_prompt=2": [
        "rl.critic.updates = 4: more steps than the 2 responses of an iteration (rl.rollout); make it smaller, or "
        "sample more",
    ],
    "rl.rollout.prompts_per_iteration=1 rl.rollout.samples_per_prompt=2 rl.critic.updates=1": [
        "rl.ppo.mini_batches = 4: more steps than the 2 responses of an iteration (rl.rollout); make it smaller, or "
        "sample more",
    ],
    "rl.ppo.dual_clip=1.1": [
        "rl.ppo.dual_clip = 1.1: must be above 1 + rl.ppo.clip_high = 1.2: it bounds what the ratio clip leaves; "
        "choose e.g. 3, or none",
    ],
}


@pytest.mark.parametrize("overrides", BAD)
def test_contradictions(overrides):
    config = load_run(None, ["preset=step3_vl_tiny", *overrides.split()]).config
    assert [str(problem) for problem in check_rl(config.rl)] == BAD[overrides]


def test_every_run_is_checked():
    with pytest.raises(ConfigErrors, match="rl.critic.updates = 6: must be a multiple"):
        load_checked_run(None, ["preset=step3_vl_tiny", "rl.critic.updates=6"])


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "rl.ppo.strict_on_policy=true rl.ppo.mini_batches=1 rl.ppo.ratio_mode=detached rl.critic.updates=12",
        "rl.critic.updates=1",
        "rl.ppo.dual_clip=3 rl.ppo.value_clip=none rl.ppo.tis_clip=none",
    ],
)
def test_possible(overrides):
    assert check_rl(load_run(None, ["preset=step3_vl_tiny", *overrides.split()]).config.rl) == []


def test_the_vision_part_must_be_frozen_and_the_decoder_must_not():
    config = load_run(None, ["preset=step3_vl_tiny", "model.freeze_decoder=true"]).config
    assert [str(problem) for problem in check_ready_for_rl(config)] == [
        "model.freeze_vision = false: features of images are made once and kept; set it true",
        "model.freeze_projector = false: features of images are made once and kept; set it true",
        "model.freeze_decoder = true: there would be nothing to train; set it false",
    ]
    frozen = ["preset=step3_vl_tiny", "model.freeze_vision=true", "model.freeze_projector=true"]
    assert check_ready_for_rl(load_run(None, frozen).config) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.ppo.gamma=0", "rl.ppo.gamma = 0: must be greater than 0; change the value"),
        ("rl.ppo.lambda_actor=1.5", "rl.ppo.lambda_actor = 1.5: must be at most 1; change the value"),
        ("rl.ppo.kl_form=k1", "rl.ppo.kl_form = k1: must be one of k2, k3; choose one of them"),
        ("rl.ppo.mini_batch=2", "rl.ppo.mini_batch: unknown key; did you mean rl.ppo.mini_batches?"),
    ],
)
def test_single_keys(override, message):
    with pytest.raises(ConfigErrors) as caught:
        load_run(None, [override])
    assert [str(problem) for problem in caught.value.problems] == [message]
