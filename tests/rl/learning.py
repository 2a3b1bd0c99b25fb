"""Whole iterations of learning on the ranks, with models that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megatron_vl.checkpoint.live import mains
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.checkpoint.resume import restore
from megatron_vl.checkpoint.saver import Saver
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.config.dump import to_yaml
from megatron_vl.config.schema import CheckpointConfig, RunConfig
from megatron_vl.errors import DataError
from megatron_vl.parallel.runtime import Runtime, choose_device, start
from megatron_vl.rl.build import ACTOR, CRITIC, Models, build_models
from megatron_vl.rl.learn import Learnt, learn
from megatron_vl.rl.offload import Turns
from megatron_vl.rl.trajectory import Trajectory
from megatron_vl.rl.update import OLD, score_policy
from megatron_vl.train.build import Parts
from tests.fixtures.small import RandomWeights
from tests.rl.made import VERSION, features_of
from tests.rl.on_ranks import batches_of


def runtime_of(config: RunConfig) -> Runtime:
    return start(config.parallel, config.train.seed, choose_device("cpu"))


def models_of(config: RunConfig, runtime: Runtime | None = None) -> Models:
    return build_models(config, runtime or runtime_of(config), RandomWeights(config.model))


def vision_weights(parts: Parts) -> dict[str, torch.Tensor]:
    """Copies of tower and projector of this rank."""
    return {
        name: parameter.detach().clone()
        for chunk in parts.chunks
        for name, parameter in chunk.module.named_parameters()
        if name.startswith(("vision_model.", "projector."))
    }


def as_sampled(models: Models, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories with the trainer's own log-probabilities as those of the sampler. One data-parallel rank."""
    actor = models.turns.take(ACTOR)
    (batches,) = batches_of(actor, trajectories)
    score_policy(actor, batches)
    found = {n: values for item in batches for n, values in item.tokens(OLD).items()}
    return [
        replace(t, response=replace(t.response, logprobs=tuple(found[n].tolist())))
        for n, t in enumerate(trajectories)
    ]


@dataclass
class Iterations:
    """vision: tower and projector before and after. trained: names of what the actor's optimizer holds."""

    learnt: list[Learnt] = field(default_factory=list)
    vision: list[dict[str, torch.Tensor]] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    critic_names: list[str] = field(default_factory=list)


def iterations_on_rank(
    config: RunConfig, trajectories: Sequence[Trajectory], count: int, same_engine: bool = False
) -> Iterations:
    """Some iterations on the same trajectories."""
    models, seen = models_of(config), Iterations()
    features = features_of if models.actor.runtime.is_first_stage else None
    if same_engine:
        trajectories = as_sampled(models, trajectories)
    models.turns.take(ACTOR)
    seen.vision.append(vision_weights(models.actor))
    for iteration in range(count):
        seen.learnt.append(learn(models, trajectories, iteration, VERSION, features))
    models.turns.take(ACTOR)
    seen.vision.append(vision_weights(models.actor))
    names = {id(p): n for chunk in models.actor.chunks for n, p in chunk.module.named_parameters()}
    seen.trained = sorted({names[id(main.parameter)] for main in mains(models.actor.optimizer)})
    seen.critic_names = [n for chunk in models.critic.chunks for n, _ in chunk.module.named_parameters()]
    return seen


def refused_on_rank(config: RunConfig, trajectories: Sequence[Trajectory]) -> tuple[str, bool]:
    """The error of an iteration, and whether it came before anything was changed. One rank."""
    models = models_of(config)
    before = state_of(models)
    try:
        learn(models, trajectories, 0, VERSION, features_of)
    except DataError as error:
        after = state_of(models)
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    return "", False


def state_of(models: Models) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of both models on this rank."""
    models.turns.all_here()
    live = models.live()
    return {
        f"{side.prefix}{slot.what}/{slot.rule.ours}": slot.values.clone()
        for side in (live, live.beside)
        for slot in (*side.weights(), *side.optimizer_state())
    }


def turns_on_rank(config: RunConfig, trajectories: Sequence[Trajectory], fault: bool) -> dict[str, object]:
    """The same iteration with models that take turns, and with models that stay; whether all is equal after it."""
    results, runtime = [], runtime_of(config)
    for stays in (False, True):
        models = models_of(config, runtime)
        held = {name: model.bytes_held for name, model in models.turns.models.items()}
        if stays:
            models.turns.all_here()
            models.turns = StayingTurns(models.turns)
        features = features_of if models.actor.runtime.is_first_stage else None
        for iteration in range(2):
            if fault and not stays:
                models.turns.models[CRITIC].release()
                for copy in models.turns.models[CRITIC]._host.values():
                    copy[:4] = 63
            learn(models, trajectories, iteration, VERSION, features)
        others = {name: model.bytes_held for name, model in models.turns.models.items()}
        results.append((held, others, state_of(models)))
    (held, others, turned), (_, _, stayed) = results
    assert turned.keys() == stayed.keys()
    return {
        "held when built": held,
        "held after": others,
        "different": [name for name in turned if not torch.equal(turned[name], stayed[name])],
    }


class StayingTurns(Turns):
    """Nobody leaves the device."""

    def __init__(self, turns: Turns) -> None:
        self.models = turns.models

    def take(self, name: str) -> Parts:
        return self.models[name].parts


def saved_on_rank(config: RunConfig, trajectories: Sequence[Trajectory], folder: str) -> None:
    """One iteration, then a checkpoint of both models, then another iteration whose weights are kept in a file."""
    models = models_of(config)
    features = features_of if models.actor.runtime.is_first_stage else None
    learn(models, trajectories, 0, VERSION, features)
    models.turns.all_here()
    saver = Saver(Path(folder), CheckpointConfig(), models.live(), to_yaml(config), lambda text: None)
    saver.begin(Progress(1, 1))
    saver.finish()


def metrics_after(config: RunConfig, trajectories: Sequence[Trajectory], checkpoint: str | None) -> Learnt:
    """Iteration 1 after iteration 0, or after the checkpoint that was saved behind it, in any layout."""
    models = models_of(config)
    features = features_of if models.actor.runtime.is_first_stage else None
    if checkpoint is None:
        learn(models, trajectories, 0, VERSION, features)
    else:
        models.turns.all_here()
        restore(Stored(checkpoint), models.live(), 1, lambda text: None)
    return learn(models, trajectories, 1, VERSION, features)
