"""Iterations of learning: order, strict mode, warm-up, frozen parts, turns, checkpoints of both models."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.checkpoint.stored import Stored
from megatron_vl.checkpoint.weights import CheckpointWeights
from megatron_vl.config.rl import ActorConfig, CriticConfig, PpoConfig, RlConfig, RolloutConfig
from megatron_vl.rl.learn import actor_learns, actor_rate, critic_rate
from tests.rl.faults import FaultyWorld
from tests.rl.learning import (
    iterations_on_rank,
    metrics_after,
    refused_on_rank,
    saved_on_rank,
    turns_on_rank,
)
from tests.rl.made import make_trajectories, run_of

TRAJECTORIES = make_trajectories()
STRICT = PpoConfig(mini_batches=1, ratio_mode="detached", strict_on_policy=True)
FAST = {"actor": ActorConfig(lr=1e-3), "critic": CriticConfig(lr=1e-2, updates=4)}


def iterations(
    world, layout="1", ppo=None, count=1, same_engine=False, trajectories=TRAJECTORIES, packed=True, **rl
):
    config, place = run_of(layout, packed, ppo=ppo, **(FAST | rl))
    return world.run(place.world_size, iterations_on_rank, config, trajectories, count, same_engine)


def test_strict_ratio_is_exactly_one_and_nothing_is_clipped(world):
    (seen,) = iterations(world, ppo=STRICT, count=2, same_engine=True)
    for learnt in seen.learnt:
        (step,) = learnt.actor
        assert step.metrics["ratio_min"] == step.metrics["ratio_max"] == 1.0
        assert step.metrics["clip_fraction"] == step.metrics["approx_kl_k3"] == 0.0
        assert len(learnt.critic) == 4 and not step.skipped
    first, second = (learnt.actor[0].metrics for learnt in seen.learnt)
    assert first["mismatch_max"] < 1e-5 and seen.learnt[0].alarms == []
    assert first["ess"] == pytest.approx(1, abs=1e-6)
    assert second["mismatch_mean"] > 1e-3, "the policy has moved away from the sampler"


def test_strict_refuses_samples_of_other_weights(world):
    other = replace(TRAJECTORIES[5], response=replace(TRAJECTORIES[5].response, weight_version="weights-0"))
    mixed = [*TRAJECTORIES[:5], other, *TRAJECTORIES[6:]]
    config, _ = run_of("1", ppo=STRICT, **FAST)
    message, untouched = world.run(1, refused_on_rank, config, mixed)[0]
    assert "1 of 10 trajectories" in message and "p5/0 by weights-0" in message and untouched
    (seen,) = iterations(world, trajectories=mixed)
    assert seen.learnt[0].counts["stale"] == 1


def test_off_policy_steps_start_at_ratio_one_and_leave_it(world):
    """Four mini-batches: the first is still the policy before the iteration; engines that differ are told of."""
    (seen,) = iterations(world)
    (learnt,) = seen.learnt
    assert [round(step.metrics["tokens"]) for step in learnt.actor] == [
        round(step.metrics["tokens"]) for step in learnt.critic
    ]
    assert sum(step.metrics["tokens"] for step in learnt.actor) == learnt.counts["tokens"]
    first, *later = (step.metrics for step in learnt.actor)
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and first["approx_kl_k3"] < 1e-9
    assert max(abs(metrics["ratio_max"] - 1) for metrics in later) > 1e-3
    assert len(learnt.alarms) == 2 and "mismatch_mean" in learnt.alarms[0]
    assert learnt.counts == {"trajectories": 10, "masked": 0, "truncated": 1, "stale": 0, "tokens": 58}


def test_advantages_have_mean_zero_and_deviation_one_over_the_iteration(world):
    """Over all mini-batches and ranks; the critic begins with V near 0, so returns are rewards."""
    for layout in ("1", "dp2"):
        (seen, *_) = iterations(world, layout, packed=False)
        steps = [step.metrics for step in seen.learnt[0].actor]
        count = sum(m["tokens"] for m in steps)
        mean = sum(m["advantage_mean"] * m["tokens"] for m in steps) / count
        square = (
            sum((m["advantage_std"] ** 2 + m["advantage_mean"] ** 2) * m["tokens"] for m in steps) / count
        )
        assert mean == pytest.approx(0, abs=1e-6) and square == pytest.approx(1, rel=1e-5)
        returns = sum(m.metrics["return_mean"] * m.metrics["tokens"] for m in seen.learnt[0].critic) / count
        rewards = sum(sum(t.rewards()) * len(t.response.tokens) for t in TRAJECTORIES) / count
        assert returns == pytest.approx(rewards, rel=1e-5)
        assert seen.learnt[0].critic[0].metrics["value_mean"] == pytest.approx(0, abs=1e-3)


def losses(seen):
    return [step.metrics["loss"] for learnt in seen.learnt for step in (*learnt.critic, *learnt.actor)]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "packed"), [("tp2pp2cp2sp", True), ("dp2tp2pp2", False)])
def test_iterations_are_the_same_in_every_layout(world, layout, packed):
    """Padded rows for DP: the few documents of a mini-batch would fill one packed row, and one rank."""
    expected = losses(iterations(world, count=2)[0])
    for seen in iterations(world, layout, count=2, packed=packed):
        assert losses(seen) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_advantages_normalised_per_rank_are_found(world):
    expected = losses(iterations(world)[0])
    faulty = losses(iterations(FaultyWorld(world, "normalised_per_rank"), "dp2", packed=False)[0])
    assert max(abs(a - b) for a, b in zip(faulty, expected)) > 1e-2


def test_frozen_is_frozen(world):
    """Bit-identical tower and projector, not in the optimizer; the critic has none."""
    for seen in iterations(world, "tp2pp2", count=2):
        before, after = seen.vision
        assert (
            all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
        )
        assert seen.trained and not [n for n in seen.trained if n.startswith(("vision_model.", "projector."))]
        assert not [n for n in seen.critic_names if "vision_model" in n or "projector" in n]
    assert len(iterations(world, count=1)[0].vision[0]) > 10, "there is a tower"


def test_critic_alone_at_first(world):
    critic = replace(FAST["critic"], warmup_iterations=1, updates=2)
    (seen,) = iterations(world, count=2, critic=critic, ppo=PpoConfig(mini_batches=4))
    assert [len(learnt.actor) for learnt in seen.learnt] == [0, 4]
    assert [len(learnt.critic) for learnt in seen.learnt] == [2, 2]
    assert seen.learnt[1].critic[0].metrics["loss"] < seen.learnt[0].critic[0].metrics["loss"], "it learns"


def test_masked_trajectories_take_no_part(world):
    masked = [
        replace(t, masked=n == 4, reward=1e9 if n == 4 else t.reward) for n, t in enumerate(TRAJECTORIES)
    ]
    (seen,) = iterations(world, trajectories=masked)
    (without,) = iterations(world, trajectories=[t for n, t in enumerate(TRAJECTORIES) if n != 4])
    assert losses(seen) == losses(without)
    assert seen.learnt[0].counts["masked"] == 1


def test_rates_of_warm_up():
    rl = RlConfig(
        actor=ActorConfig(lr=1.0, lr_warmup_steps=4),
        critic=CriticConfig(lr=2.0, lr_warmup_steps=4, updates=2, warmup_iterations=1),
        ppo=PpoConfig(mini_batches=2),
        rollout=RolloutConfig(),
    )
    assert [actor_learns(rl, i) for i in range(3)] == [False, True, True]
    assert [actor_rate(rl, i, m) for i in (1, 2, 3) for m in (0, 1)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [critic_rate(rl, i, u) for i in (0, 1, 2) for u in (0, 1)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("layout", ["1", pytest.param("dp2tp2pp2", marks=pytest.mark.slow)])
def test_models_that_take_turns_learn_the_same_bit_by_bit(world, layout):
    config, place = run_of(layout, **FAST)
    for seen in world.run(place.world_size, turns_on_rank, config, TRAJECTORIES, False):
        assert seen["different"] == []
        assert seen["held when built"] == {"actor": 0, "critic": 0}, "memory is given back"
        assert seen["held after"]["actor"] > 0 and seen["held after"]["critic"] == 0


def test_a_copy_that_is_lost_on_the_way_is_found(world):
    config, place = run_of("1", **FAST)
    (seen,) = world.run(place.world_size, turns_on_rank, config, TRAJECTORIES, True)
    assert any(name.startswith("critic/") for name in seen["different"])


def test_one_checkpoint_holds_both_and_any_layout_goes_on(world, tmp_path):
    config, place = run_of("tp2sp", **FAST)
    world.run(place.world_size, saved_on_rank, config, TRAJECTORIES, str(tmp_path))
    (checkpoint,) = tmp_path.glob("step_*")
    stored = Stored(checkpoint)
    assert stored.tensors["critic/model/value_head.weight"].shape == (1, 32)
    assert "critic/model/lm_head.weight" not in stored.tensors and "model/lm_head.weight" in stored.tensors
    assert not [name for name in stored.tensors if name.startswith("critic/") and "vision" in name]
    assert "critic/optimizer/exp_avg/value_head.weight" in stored.tensors
    assert set(stored.state["optimizer_steps"].values()) == {4}
    assert CheckpointWeights(checkpoint).weights, "the actor can be exported like any trained model"
    plain, _ = run_of("1", **FAST)
    (expected,) = world.run(1, metrics_after, plain, TRAJECTORIES, None)
    for layout in ("1", "pp2"):
        config, place = run_of(layout, **FAST)
        (found, *_) = world.run(place.world_size, metrics_after, config, TRAJECTORIES, str(checkpoint))
        for ours, theirs in zip((*found.critic, *found.actor), (*expected.critic, *expected.actor)):
            assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-3, abs=1e-4)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)
