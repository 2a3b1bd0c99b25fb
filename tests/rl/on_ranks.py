"""What the ranks do for the tests of rl/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_vl.checkpoint.hf_names import global_name, rules_by_name
from megatron_vl.config.schema import RunConfig
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parity.on_rank import Seen, gather_gradients
from megatron_vl.plan.row_work import WorkRates
from megatron_vl.rl.build import CriticWeights
from megatron_vl.rl.metrics import policy_metrics, value_metrics
from megatron_vl.rl.rows import RlBatch, RowShape, make_batches, plan_rows
from megatron_vl.rl.trajectory import Trajectory
from megatron_vl.rl.update import (
    OLD,
    VALUES,
    inputs_of,
    policy_gradients,
    score_policy,
    score_values,
    value_gradients,
)
from megatron_vl.train.build import Parts, build
from tests.fixtures.small import RandomWeights
from tests.rl.made import features_of

ACTOR, CRITIC = "actor", "critic"


def weights_of(config: RunConfig) -> CriticWeights:
    """For actor and critic; the value head is not near zero, so that its faults are seen."""
    return CriticWeights(RandomWeights(config.model), config.model.text.hidden_size, std=0.3, seed=9)


def build_parts(config: RunConfig, kind: str, with_optimizer: bool = False) -> Parts:
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    return build(config, runtime, weights_of(config), with_optimizer, value_head=kind == CRITIC)


def batches_of(parts: Parts, trajectories: Sequence[Trajectory], pieces: int = 1) -> list[list[RlBatch]]:
    """Micro-batches of this rank, piece by piece."""
    config, layout = parts.config, parts.runtime.layout
    shape = RowShape.of(config, layout)
    plan = plan_rows(trajectories, shape, WorkRates.of(config.model), pieces, layout.dp)
    mine = [piece[parts.runtime.coords.dp] for piece in plan]
    features = features_of if parts.runtime.is_first_stage else None
    return make_batches(trajectories, mine, shape, config.model.tokens.endoftext, features)


def fill_arrays(batches: Sequence[RlBatch], scale: float = 1.0) -> None:
    """Numbers per token that are a function of the trajectory: some ratios are clipped on each side."""
    for item in batches:
        for name in ("advantages", "returns", "old_values", "noise"):
            values = {}
            for span in item.spans:
                seed = 1000 * span.number + sum(map(ord, name))
                generator = torch.Generator().manual_seed(seed)
                values[span.number] = scale * torch.randn(span.length, generator=generator)
            item.fill(name, values)


@dataclass
class Answered:
    """Metrics of the update and what the rank holds of the gradients."""

    metrics: dict[str, float]
    seen: Seen
    micro_batches: int


def gradients_on_rank(config: RunConfig, trajectories: Sequence[Trajectory], kind: str) -> Answered:
    """One backward pass of actor or critic over all trajectories; old log-probabilities differ by noise."""
    parts = build_parts(config, kind)
    (batches,) = batches_of(parts, trajectories)
    fill_arrays(batches)
    if kind == ACTOR:
        score_policy(parts, batches, OLD)
        score_policy(parts, batches, "reference_logprobs")
        for item in batches:
            item.arrays[OLD] = item.arrays[OLD] + 0.3 * item.arrays["noise"]
            item.arrays["reference_logprobs"] = item.arrays["reference_logprobs"] - 0.2 * item.arrays["noise"]
    for chunk in parts.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    report = (policy_gradients if kind == ACTOR else value_gradients)(parts, batches)
    seen = Seen(parts.runtime.rank)
    for chunk, stage in zip(parts.chunks, parts.stages):
        gather_gradients(chunk)
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                seen.gradients[global_name(name, stage.layers)] = parameter.main_grad.detach().clone()
            else:
                assert parameter.grad is None and getattr(parameter, "main_grad", None) is None, name
    metrics = policy_metrics(report) if kind == ACTOR else value_metrics(report)
    return Answered(metrics, seen, len(batches))


def plain_on_rank(
    config: RunConfig, trajectories: Sequence[Trajectory], kind: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """(mean loss, gradients of weights that are the same in the release) of one rank without losses of the package."""
    parts = build_parts(config, kind)
    (batches,) = batches_of(parts, trajectories)
    fill_arrays(batches)
    model, ppo, terms = parts.chunks[0].module, config.rl.ppo, []
    for item in batches:
        inputs = inputs_of(item, parts)
        (span,) = item.spans
        a, goal, old_value, noise = (
            item.arrays[name][span.targets] for name in ("advantages", "returns", "old_values", "noise")
        )
        hidden = model._hidden_states(inputs)[span.first : span.first + span.length, 0]
        if kind == CRITIC:
            values = hidden @ model.value_head.weight[0]
            near = torch.clamp(values, old_value - ppo.value_clip, old_value + ppo.value_clip)
            terms.append(torch.maximum((values - goal) ** 2, (near - goal) ** 2) / 2)
            continue
        response = torch.tensor(trajectories[span.number].response.tokens)
        everything = (hidden @ model.language_model.output_layer.weight.T).log_softmax(dim=-1)
        logp = everything.gather(1, response[:, None])[:, 0]
        now = logp.detach()
        old, reference = now + 0.3 * noise, now - 0.2 * noise
        ratio = torch.exp(logp - old)
        gain = torch.where(a >= 0, ratio.clamp(max=1 + ppo.clip_high), ratio.clamp(min=1 - ppo.clip_low))
        gain = torch.where(a < 0, gain.clamp(max=ppo.dual_clip), gain) * a
        sampled = torch.tensor(trajectories[span.number].response.logprobs)
        weight = torch.exp(old - sampled).clamp(max=ppo.tis_clip)
        kl = torch.exp(reference - logp) - 1 - (reference - logp)
        entropy = -(everything.exp() * everything).sum(dim=-1)
        terms.append(-weight * gain + ppo.kl_coef * kl - ppo.entropy_coef * entropy)
    loss = torch.cat(terms).mean()
    rules, wanted = rules_by_name(config.model), {}
    for name, parameter in model.named_parameters():
        rule = rules[global_name(name, parts.stages[0].layers)]
        if parameter.requires_grad and rule.kind == "copy":
            wanted[rule.hf[0][0]] = parameter
    return loss.item(), dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()))))


@dataclass
class Scored:
    """Per trajectory of this data-parallel rank, by number: log-probabilities, values, value behind the end."""

    logprobs: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    behind: dict[int, torch.Tensor] = field(default_factory=dict)


def scores_on_rank(config: RunConfig, trajectories: Sequence[Trajectory]) -> Scored:
    """Forward passes of actor and critic."""
    found = Scored()
    actor = build_parts(config, ACTOR)
    critic = build(config, actor.runtime, weights_of(config), with_optimizer=False, value_head=True)
    (batches,) = batches_of(actor, trajectories)
    score_policy(actor, batches)
    score_values(critic, batches)
    for item in batches:
        found.logprobs |= item.tokens(OLD)
        found.values |= item.tokens(VALUES)
        found.behind |= item.values_behind(VALUES)
    return found
