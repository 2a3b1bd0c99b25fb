"""The first half of an iteration: responses from the sampler, verdicts from the verifiers, rewards; journalled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vl.generate.request import Request, Response, requests_for
from megatron_vl.generate.weight_version import weight_version
from megatron_vl.rl.build import ACTOR
from megatron_vl.rl.journal import Found, Journal
from megatron_vl.rl.prompt_set import RlPrompt
from megatron_vl.rl.rewards.compose import Reward, RewardWeights, compose
from megatron_vl.rl.rewards.score import score_all
from megatron_vl.rl.rewards.verdict import Verdict
from megatron_vl.rl.run import RlRun
from megatron_vl.rl.trajectory import Trajectory
from megatron_vl.train.ahead import first_does

AT_ONCE = 1024  # responses that are verified between two entries of the journal


@dataclass(frozen=True)
class Scored:
    """One response with its text and reward."""

    prompt: RlPrompt
    response: Response
    text: str
    reward: Reward

    @property
    def trajectory(self) -> Trajectory:
        """What is learnt from."""
        return Trajectory(
            self.prompt.prompt,
            self.response,
            self.reward.total,
            masked=self.reward.masked,
            reward_parts=self.reward.parts,
            source=self.prompt.source,
        )


@dataclass(frozen=True)
class Collected:
    """The responses of an iteration, equal on every rank, prompt by prompt. resumed: how many the journal had.

    damaged: lines of the journal that could not be used. version: of the weights that drew them.
    """

    scored: list[Scored]
    version: str
    resumed: int
    damaged: int


def collect(
    run: RlRun,
    prompts: Sequence[RlPrompt],
    samples: int,
    iteration: int,
    folder: Path,
    seed: int,
    lap: Callable[[str], None] | None = None,
) -> Collected | None:
    """``samples`` responses to each prompt, with rewards; None on every rank when any has been asked to stop.

    lap: told when a phase (features, generate, verify) has ended. folder: of the journal; what is there of these
    requests and weights is not drawn again.

    Raises:
        DataError: more verdicts are missing than ``rl.rewards.max_error_share`` allows; on every rank.
    """
    parts = run.models.turns.take(ACTOR)
    run.phase.enter("computing image features", iteration, run.step_seconds)
    run.store.ensure([image for prompt in prompts for image in prompt.images])
    lap = lap or _nothing
    lap("features")
    version = weight_version(parts)
    requests = list(requests_for([prompt.prompt for prompt in prompts], samples, seed, iteration))
    with Journal(folder, iteration) if run.runtime.rank == 0 else nullcontext() as journal:
        found = _found(journal, version, requests)
        responses = draw(run, requests, found, journal)
        if responses is None:
            return None
        lap("generate")
        verdicts = judge(run, prompts, samples, responses, found, journal)
    lap("verify")
    by_id = {prompt.prompt.prompt_id: prompt for prompt in prompts}
    weights = reward_weights(run)
    scored = []
    for response, verdict in zip(responses, verdicts, strict=True):
        prompt, text = by_id[response.prompt_id], run.prompts.builder.text(response.tokens)
        scored.append(
            Scored(prompt, response, text, compose(prompt.task, verdict, prompt.text, text, weights))
        )
    return Collected(scored, version, len(found.responses), found.damaged)


def draw(
    run: RlRun, requests: Sequence[Request], found: Found, journal: Journal | None
) -> list[Response] | None:
    """A response for each request in their order; wave by wave, so that a kill costs one wave."""
    run.phase.enter("generating", limit=run.step_seconds)
    known = dict(found.responses)
    missing = [r for r in requests if (r.prompt.prompt_id, r.sample_index) not in known]
    wave = run.config.rl.rollout.wave
    for start in range(0, len(missing), wave):
        if stop_is_agreed(run):
            return None
        drawn = run.rollouts.generate(missing[start : start + wave], run.params)
        if journal is not None:
            journal.add_responses(drawn)
        known |= {(r.prompt_id, r.sample_index): r for r in drawn}
        run.phase.tick()
    return [known[r.prompt.prompt_id, r.sample_index] for r in requests]


def judge(
    run: RlRun,
    prompts: Sequence[RlPrompt],
    samples: int,
    responses: Sequence[Response],
    found: Found,
    journal: Journal | None,
) -> list[Verdict]:
    """The verdict on each response: rank 0 asks the verifiers, all ranks get the answers."""
    run.phase.enter("verifying", limit=run.step_seconds)
    tasks = [prompt.task for prompt in prompts for _ in range(samples)]
    known = dict(found.verdicts)
    told: list[list[Verdict]] = [[]]

    def work(report) -> None:
        rewards = run.config.rl.rewards
        open_ = [n for n, r in enumerate(responses) if (r.prompt_id, r.sample_index) not in known]
        allowed = rewards.max_error_share * len(responses)
        for start in range(0, len(open_), AT_ONCE):
            chosen = open_[start : start + AT_ONCE]
            verdicts, tally = score_all(
                [tasks[n] for n in chosen],
                [run.prompts.builder.text(responses[n].tokens) for n in chosen],
                [responses[n].finish_reason for n in chosen],
                run.services,
                min(allowed / len(chosen), 1.0),
            )
            allowed = max(allowed - tally.errors, 0.0)
            new = [(responses[n], verdict) for n, verdict in zip(chosen, verdicts)]
            journal.add_verdicts(new)
            known.update({(r.prompt_id, r.sample_index): verdict for r, verdict in new})
            if len(open_) > AT_ONCE:
                report(f"verified {min(start + AT_ONCE, len(open_))} of {len(open_)} responses")
        told[0] = [known[r.prompt_id, r.sample_index] for r in responses]

    first_does(work, run.runtime, run.phase, run.say)
    dist.broadcast_object_list(told, src=0)
    return told[0]


def reward_weights(run: RlRun) -> RewardWeights:
    """Raises ConfigErrors for weights that contradict each other."""
    rewards = run.config.rl.rewards
    return RewardWeights(rewards.score, rewards.language, rewards.language_share)


def stop_is_agreed(run: RlRun) -> bool:
    """Whether any rank has been asked to stop; the same on every rank, which all call it."""
    state = torch.tensor([run.stop.number], dtype=torch.int64, device=run.runtime.device)
    dist.all_reduce(state, op=dist.ReduceOp.MAX)
    run.stop.agreed = int(state.item())
    return bool(run.stop.agreed)


def _found(journal: Journal | None, version: str, requests: Sequence[Request]) -> Found:
    found: list = [None]
    if journal is not None:
        found[0] = journal.scan(version, requests)
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _nothing(phase: str) -> None:
    """For callers that measure nothing."""
