"""Forward passes that score, and optimizer steps with the losses of PPO, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from megatron_vl.config.rl import PpoConfig
from megatron_vl.data.template import NOT_SCORED
from megatron_vl.model.step3_vl import StageInputs
from megatron_vl.ops.cross_entropy import Scoring, TokenScores
from megatron_vl.optim.build import set_learning_rate
from megatron_vl.parallel.context_parallel import global_order, take_local
from megatron_vl.rl.metrics import (
    POLICY,
    VALUE,
    Fields,
    policy_metrics,
    policy_report,
    value_metrics,
    value_report,
)
from megatron_vl.rl.ppo_loss import PolicyTokens, policy_terms, value_terms
from megatron_vl.rl.rows import RlBatch
from megatron_vl.train.build import Parts
from megatron_vl.train.step import (
    accumulate_gradients,
    begin_step,
    no_tick,
    run_schedule,
    send_from_last_stage,
    stage_inputs,
    total_of_reports,
    update,
)

OLD, VALUES = "old_logprobs", "values"
Tick = Callable[[], None]


@dataclass(frozen=True)
class Update:
    """One optimizer step. metrics: over the tokens of the whole mini-batch. grad_norm: before clipping.

    skipped: loss or gradient was not finite, and nothing was changed; the same on every rank.
    """

    metrics: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool


def inputs_of(item: RlBatch, parts: Parts) -> StageInputs:
    """The micro-batch on the device, with its features where the embedding is."""
    device = parts.runtime.device
    features = None if item.features is None else item.features.to(device, non_blocking=True)
    return replace(stage_inputs(item.batch, device), features=features)


class LocalTokens:
    """What this context-parallel rank needs of the response tokens of a micro-batch: 1-D, masked ones left out."""

    def __init__(self, item: RlBatch, inputs: StageInputs, parts: Parts) -> None:
        self.item, self.inputs, self.cp = item, inputs, parts.runtime.groups.cp
        self.mask = take_local(inputs.labels, inputs.bounds, self.cp) != NOT_SCORED

    def array(self, name: str) -> torch.Tensor:
        """Numbers of ``RlBatch.arrays`` at this rank's tokens, fp32 ``[n]``."""
        whole = self.item.arrays[name].to(self.mask.device, non_blocking=True)
        return self.chosen(take_local(whole, self.inputs.bounds, self.cp))

    def chosen(self, values: torch.Tensor) -> torch.Tensor:
        """``[b, S / cp] -> [n]``."""
        return values[self.mask]

    @property
    def count(self) -> torch.Tensor:
        return self.mask.sum().to(torch.int)


# -- scoring ---------------------------------------------------------------------------------------------------


def score_policy(parts: Parts, batches: Sequence[RlBatch], name: str = OLD, tick: Tick = no_tick) -> None:
    """Log-probabilities of the response tokens under the model's weights, put into ``arrays[name]``."""
    _score(parts, batches, name, Scoring(), tick)


def score_values(parts: Parts, batches: Sequence[RlBatch], tick: Tick = no_tick) -> None:
    """The critic's value of the state behind every token, put into ``arrays["values"]``."""
    _score(parts, batches, VALUES, None, tick)


@torch.no_grad()
def _score(parts: Parts, batches: Sequence[RlBatch], name: str, scoring: Scoring | None, tick: Tick) -> None:
    for chunk in parts.chunks:
        chunk.eval()

    def step(items: Iterator[RlBatch], model: torch.nn.Module):
        tick()
        inputs = inputs_of(next(items), parts)
        return (model(inputs) if scoring is None else model(inputs, scoring)), keep

    def keep(output: torch.Tensor | TokenScores):
        kept = output.logprobs if isinstance(output, TokenScores) else output
        return kept.sum(), torch.tensor(1, dtype=torch.int, device=kept.device), kept

    local = run_schedule(parts, step, batches)
    for item, row in zip(batches, in_natural_order(parts, batches, local), strict=True):
        item.arrays[name] = row


def in_natural_order(
    parts: Parts, batches: Sequence[RlBatch], local: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What the last stage's ranks hold of each micro-batch, ``[b, S / cp]``, as whole rows ``[b, S]`` on every rank.

    Context parallelism holds the tokens of a row in zigzag order; here they stand in the order of the row. fp32, CPU.
    """
    cp = parts.runtime.groups.cp
    shape = (len(batches), *batches[0].input_ids.shape)
    whole = torch.zeros(shape, dtype=torch.float32, device=parts.runtime.device)
    if parts.runtime.is_last_stage:
        mine = torch.stack([row.float() for row in local])
        if cp.size() == 1:
            whole.copy_(mine)
        else:
            flat = mine.new_empty((cp.size() * mine.shape[0], *mine.shape[1:]))
            dist.all_gather_into_tensor(flat, mine, group=cp)
            parts_of = flat.view(cp.size(), *mine.shape)
            for number, item in enumerate(batches):
                bounds = tuple(item.batch.cu_seqlens or (0, shape[-1]))
                order = global_order(bounds, cp.size(), mine.device)
                whole[number] = torch.cat(list(parts_of[:, number]), dim=-1)[:, order]
    send_from_last_stage(parts, whole)
    return list(whole.cpu())


# -- updates ---------------------------------------------------------------------------------------------------


def update_actor(parts: Parts, batches: Sequence[RlBatch], lr: float, tick: Tick = no_tick) -> Update:
    """One step of the policy. arrays: ``advantages``, ``sampler_logprobs``, and the others that the loss asks for."""
    ppo = parts.config.rl.ppo
    begin_step(parts)
    report = policy_gradients(parts, batches, tick)
    metrics = policy_metrics(report)
    if ppo.strict_on_policy:
        assert_on_policy(metrics)
    return _finish(parts, metrics, lr)


def policy_gradients(parts: Parts, batches: Sequence[RlBatch], tick: Tick = no_tick) -> torch.Tensor:
    """Gradients of the policy's loss, summed and divided by the global count of response tokens; the report."""
    step = partial(_policy_step, parts, tick)
    return _reduced(parts, accumulate_gradients(parts, step, batches), POLICY)


def _policy_step(parts: Parts, tick: Tick, items: Iterator[RlBatch], model: torch.nn.Module):
    tick()
    item = next(items)
    inputs = inputs_of(item, parts)
    ppo = parts.config.rl.ppo
    # the entropy costs a pass over the logits: not computed backward where nothing asks for it
    return model(inputs, Scoring(entropy=True)), partial(_policy_loss, LocalTokens(item, inputs, parts), ppo)


def _policy_loss(local: LocalTokens, ppo: PpoConfig, scores: TokenScores):
    """The loss contract of Megatron-Core's schedules: (sum, token count, report), never a mean."""
    entropy = local.chosen(scores.entropy)
    tokens = PolicyTokens(
        logprobs=local.chosen(scores.logprobs),
        advantages=local.array("advantages"),
        sampler_logprobs=local.array("sampler_logprobs"),
        old_logprobs=local.array(OLD) if ppo.ratio_mode == "old_logprob" else None,
        reference_logprobs=local.array("reference_logprobs") if ppo.kl_coef > 0 else None,
        entropy=entropy if ppo.entropy_coef > 0 else entropy.detach(),
    )
    terms = policy_terms(tokens, ppo)
    return terms.loss.sum(), local.count, policy_report(tokens, terms)


def assert_on_policy(metrics: dict[str, float]) -> None:
    """The promise of strict on-policy training, kept by construction: every ratio is exactly 1 and none is clipped."""
    seen = {name: metrics[name] for name in ("ratio_min", "ratio_max", "clip_fraction", "dual_clip_fraction")}
    finite = all(value == value for value in seen.values())  # a step that is not finite is skipped anyway
    assert not finite or tuple(seen.values()) == (1.0, 1.0, 0.0, 0.0), f"strict on-policy, but {seen}"


def update_critic(parts: Parts, batches: Sequence[RlBatch], lr: float, tick: Tick = no_tick) -> Update:
    """One step of the critic. arrays: ``returns``, ``old_values``."""
    begin_step(parts)
    return _finish(parts, value_metrics(value_gradients(parts, batches, tick)), lr)


def value_gradients(parts: Parts, batches: Sequence[RlBatch], tick: Tick = no_tick) -> torch.Tensor:
    """Gradients of the critic's loss, summed and divided by the global count of response tokens; the report."""
    step = partial(_value_step, parts, tick)
    return _reduced(parts, accumulate_gradients(parts, step, batches), VALUE)


def _value_step(parts: Parts, tick: Tick, items: Iterator[RlBatch], model: torch.nn.Module):
    tick()
    item = next(items)
    inputs = inputs_of(item, parts)
    clip = parts.config.rl.ppo.value_clip
    return model(inputs), partial(_value_loss, LocalTokens(item, inputs, parts), clip)


def _value_loss(local: LocalTokens, clip: float | None, output: torch.Tensor):
    """As `_policy_loss`."""
    values, old, returns = local.chosen(output), local.array("old_values"), local.array("returns")
    terms = value_terms(values, old, returns, clip)
    return terms.loss.sum(), local.count, value_report(values, old, returns, terms)


def _reduced(parts: Parts, reports: Sequence[torch.Tensor], fields: Fields) -> torch.Tensor:
    return total_of_reports(parts, reports, fields.summed, len(fields.maxima)).cpu()


def _finish(parts: Parts, metrics: dict[str, float], lr: float) -> Update:
    set_learning_rate(parts.optimizer, lr, parts.config.optim.weight_decay)
    _, norm, skipped = update(parts, metrics["loss"])
    for chunk in parts.chunks:  # sampling, weight sync and off-loading come next
        chunk.wait_for_weights()
    return Update(metrics, norm, lr, skipped)
