"""Actor and critic: the same decoder twice, each with its own optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_vl.checkpoint.hf_names import VALUE_HEAD
from megatron_vl.checkpoint.live import Live
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import raise_if_any
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.plan.rl_checks import check_ready_for_rl
from megatron_vl.rl.offload import Turns
from megatron_vl.train.build import Parts, build
from megatron_vl.train.prepare import live_parts

ACTOR, CRITIC, REFERENCE = "actor", "critic", "reference"
Source = Callable[[str], torch.Tensor]


class CriticWeights:
    """``released name -> whole tensor`` of a fresh critic: the actor's decoder, and a value head near zero.

    The head is drawn from ``seed`` with deviation ``std``, equal in every layout.
    """

    def __init__(self, actor: Source, hidden_size: int, std: float, seed: int) -> None:
        self.actor, self.hidden_size, self.std, self.seed = actor, hidden_size, std, seed

    def __call__(self, name: str) -> torch.Tensor:
        if name != VALUE_HEAD:
            return self.actor(name)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn((1, self.hidden_size), generator=generator) * self.std


@dataclass
class Models:
    """The models of one rank, which take turns on the device. reference: frozen, None without a KL to it."""

    actor: Parts
    critic: Parts
    reference: Parts | None
    turns: Turns

    def live(self) -> Live:
        """What one checkpoint holds: the actor as any trained model, the critic beside it under ``critic/``."""
        actor, critic = live_parts(self.actor), live_parts(self.critic)
        critic.prefix, actor.beside = f"{CRITIC}/", critic
        return actor


def build_models(config: RunConfig, runtime: Runtime, source: Source | None) -> Models:
    """Build actor, critic and, where the loss has a KL, the reference policy: all from the same weights.

    source: released name -> whole tensor of the first weights; None: a checkpoint is restored into actor and critic
    afterwards. The reference has no checkpoint of its own, so it needs a source always.

    Raises:
        ConfigErrors: the model is not one that can be trained so.
    """
    raise_if_any(check_ready_for_rl(config))
    turns = Turns()
    actor = turns.add(ACTOR, build(config, runtime, source))
    rl = config.rl
    first = None
    if source is not None:
        first = CriticWeights(source, config.model.text.hidden_size, rl.critic.init_std, config.train.seed)
    critic = turns.add(CRITIC, build(config, runtime, first, value_head=True))
    reference = None
    if rl.ppo.kl_coef > 0:
        assert source is not None, "the reference policy is read from the first weights"
        reference = turns.add(REFERENCE, build(config, runtime, source, with_optimizer=False))
    return Models(actor, critic, reference, turns)
