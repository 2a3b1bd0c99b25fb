"""One iteration of learning: values, advantages, critic, actor. Sampling and rewards come before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_vl.config.rl import PpoConfig, RlConfig
from megatron_vl.optim.schedule import warmed_up
from megatron_vl.plan.row_work import WorkRates
from megatron_vl.rl.advantages import gae
from megatron_vl.rl.build import ACTOR, CRITIC, REFERENCE, Models
from megatron_vl.rl.metrics import mismatch_alarms
from megatron_vl.rl.normalise import moments, whiten
from megatron_vl.rl.rows import FeaturesOf, RlBatch, RowShape, make_batches, plan_rows
from megatron_vl.rl.trajectory import Trajectory, check_versions, stale, usable
from megatron_vl.rl.update import (
    OLD,
    VALUES,
    Tick,
    Update,
    no_tick,
    score_policy,
    score_values,
    update_actor,
    update_critic,
)
from megatron_vl.train.build import Parts

Tokens = dict[int, torch.Tensor]  # numbers per response token, by trajectory number


@dataclass
class Learnt:
    """What an iteration did. counts: of trajectories. actor is empty while only the critic warms up.

    advantages: the mean over a response's tokens, by name, of all data-parallel ranks.
    """

    counts: dict[str, int]
    critic: list[Update] = field(default_factory=list)
    actor: list[Update] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    advantages: dict[str, float] = field(default_factory=dict)


def actor_learns(rl: RlConfig, iteration: int) -> bool:
    """Whether the policy is trained in this iteration (the first is 0), or the critic alone."""
    return iteration >= rl.critic.warmup_iterations


def actor_rate(rl: RlConfig, iteration: int, mini_batch: int) -> float:
    """Learning rate of one step of the policy; the critic's warm-up iterations do not count."""
    step = (iteration - rl.critic.warmup_iterations) * rl.ppo.mini_batches + mini_batch
    return warmed_up(rl.actor.lr, rl.actor.lr_warmup_steps, step)


def critic_rate(rl: RlConfig, iteration: int, update: int) -> float:
    """Learning rate of one step of the critic."""
    return warmed_up(rl.critic.lr, rl.critic.lr_warmup_steps, iteration * rl.critic.updates + update)


def learn(
    models: Models,
    trajectories: Sequence[Trajectory],
    iteration: int,
    weight_version: str,
    features_of: FeaturesOf | None = None,
    tick: Tick = no_tick,
) -> Learnt:
    """Train critic and actor on the trajectories; every rank calls it with the same ones.

    weight_version: of the actor now. features_of: see `rows.make_batches`. The order is that of spec and papers: the
    values are those before any update, the critic is updated first.

    Raises:
        DataError: trajectories that cannot be trained on; under strict_on_policy also those of other weights.
    """
    config = models.actor.config
    rl, layout = config.rl, models.actor.runtime.layout
    kept = usable(trajectories)
    if rl.ppo.strict_on_policy:
        check_versions(kept, weight_version)
    shape = RowShape.of(config, layout)
    plan = plan_rows(kept, shape, WorkRates.of(config.model), rl.pieces, layout.dp)
    mine = [piece[models.actor.runtime.coords.dp] for piece in plan]
    pieces = make_batches(kept, mine, shape, config.model.tokens.endoftext, features_of)
    done = Learnt(_counts(trajectories, kept, weight_version))
    learns = actor_learns(rl, iteration)
    everything = [item for piece in pieces for item in piece]
    _score_all(models, everything, kept, learns, tick)
    done.advantages = mean_advantages(models.actor, everything, kept)
    for update, batches in enumerate(steps_of(pieces, rl.critic.updates)):
        parts = models.turns.take(CRITIC)
        done.critic.append(update_critic(parts, batches, critic_rate(rl, iteration, update), tick))
    if learns:
        for mini_batch, batches in enumerate(steps_of(pieces, rl.ppo.mini_batches)):
            parts = models.turns.take(ACTOR)
            done.actor.append(update_actor(parts, batches, actor_rate(rl, iteration, mini_batch), tick))
        # the first step's policy is still the one that was sampled from: what differs there is the engine
        done.alarms = mismatch_alarms(done.actor[0].metrics, rl.rollout)
    return done


def steps_of(pieces: Sequence[Sequence[RlBatch]], steps: int) -> list[list[RlBatch]]:
    """The micro-batches of each of ``steps`` optimizer steps, whole pieces each."""
    size, rest = divmod(len(pieces), steps)
    assert rest == 0, "plan/rl_checks.py has made one a multiple of the other"
    groups = [pieces[i : i + size] for i in range(0, len(pieces), size)]
    return [[item for piece in group for item in piece] for group in groups]


def _score_all(
    models: Models, batches: list[RlBatch], kept: Sequence[Trajectory], learns: bool, tick: Tick
) -> None:
    """Everything that is computed with the weights before the updates."""
    ppo = models.actor.config.rl.ppo
    if learns and ppo.ratio_mode == "old_logprob":
        score_policy(models.turns.take(ACTOR), batches, OLD, tick)
    if learns and models.reference is not None:
        score_policy(models.turns.take(REFERENCE), batches, "reference_logprobs", tick)
    critic = models.turns.take(CRITIC)
    score_values(critic, batches, tick)
    set_advantages(critic, batches, kept)


def set_advantages(parts: Parts, batches: Sequence[RlBatch], trajectories: Sequence[Trajectory]) -> None:
    """``advantages``, ``returns`` and ``old_values`` of all micro-batches of the iteration, from ``values``.

    parts: any model of this rank, for groups and configuration. Advantages are normalised over all response tokens
    of the iteration, whichever rank and micro-batch they are in.
    """
    ppo = parts.config.rl.ppo
    found = []
    for item in batches:
        old = item.tokens(VALUES)
        item.fill("old_values", old)
        advantages, returns = advantages_and_returns(item, old, trajectories, ppo)
        item.fill("returns", returns)
        found.append(advantages)
    sums = sum((moments(a) for advantages in found for a in advantages.values()), moments(torch.zeros(0)))
    sums = sums.to(parts.runtime.device)
    dist.all_reduce(sums, group=parts.runtime.groups.dp)
    for item, advantages in zip(batches, found):
        if ppo.normalize_advantages:
            advantages = {number: whiten(values, sums) for number, values in advantages.items()}
        item.fill("advantages", advantages)


def mean_advantages(
    parts: Parts, batches: Sequence[RlBatch], trajectories: Sequence[Trajectory]
) -> dict[str, float]:
    """The mean advantage of each trajectory by its name, equal on every rank."""
    mine = {
        trajectories[number].name: float(values.mean())
        for item in batches
        for number, values in item.tokens("advantages").items()
    }
    group = parts.runtime.groups.dp
    everyone: list[dict[str, float]] = [{} for _ in range(group.size())]
    dist.all_gather_object(everyone, mine, group=group)
    return {name: value for part in everyone for name, value in part.items()}


def advantages_and_returns(
    item: RlBatch, old: Tokens, trajectories: Sequence[Trajectory], ppo: PpoConfig
) -> tuple[Tokens, Tokens]:
    """Of the trajectories of a micro-batch, by number: fp64 per response token. old: their values."""
    if not old:
        return {}, {}
    mine = [trajectories[number] for number in old]
    sizes = [len(trajectory.response.tokens) for trajectory in mine]
    lengths, values = torch.tensor(sizes), torch.cat(list(old.values())).double()
    rewards = torch.tensor([r for t in mine for r in t.rewards()], dtype=torch.float64)
    bootstrapped = torch.tensor([ppo.truncated_reward == "bootstrap" and t.truncated for t in mine])
    ends = torch.stack(list(item.values_behind(VALUES).values()))
    behind = torch.where(bootstrapped, ends, torch.zeros_like(ends))
    advantages = gae(rewards, values, lengths, behind, ppo.gamma, ppo.lambda_actor)
    returns = values + (
        advantages
        if ppo.lambda_critic == ppo.lambda_actor
        else gae(rewards, values, lengths, behind, ppo.gamma, ppo.lambda_critic)
    )
    return dict(zip(old, advantages.split(sizes))), dict(zip(old, returns.split(sizes)))


def _counts(trajectories: Sequence[Trajectory], kept: Sequence[Trajectory], version: str) -> dict[str, int]:
    return {
        "trajectories": len(trajectories),
        "masked": len(trajectories) - len(kept),
        "truncated": sum(trajectory.truncated for trajectory in kept),
        "stale": len(stale(kept, version)),
        "tokens": sum(len(trajectory.response.tokens) for trajectory in kept),
    }
