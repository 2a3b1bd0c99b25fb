"""Where responses for reinforcement learning come from, behind one small interface; ``local`` is the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_vl.generate.batches import CacheCost, cache_cost, cut_batches, refuse_large, share
from megatron_vl.generate.forward import sampling_mode
from megatron_vl.generate.request import Request, Response, SamplingParams, check_requests
from megatron_vl.generate.sampler import Drawn, Features, OnToken, Sampler
from megatron_vl.generate.weight_version import weight_version
from megatron_vl.plan.stages import plan_stages
from megatron_vl.train.build import Parts
from megatron_vl.train.step import no_tick

MEET_EVERY = 64  # tokens; a rank that has ended waits at most that long for one that has not


class Rollouts(Protocol):
    """What the training loop asks for responses."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """A response for each request, in their order, equal on every rank; every rank calls it with the same."""


class LocalRollouts:
    """The sampler on the training model: the same weights object, no copy, any TP x PP, requests over DP x CP.

    Each context-parallel rank takes requests of its own: rows are not cut. features: see `Sampler`. large: allow models
    of more than 1B parameters.

    Raises:
        ConfigError: the model is too large, or its layers are not those of the torch backend.
    """

    def __init__(
        self,
        parts: Parts,
        features: Features,
        large: bool = False,
        tick: Callable[[], None] = no_tick,
    ) -> None:
        refuse_large(parts.config.model, large or parts.config.generate.allow_large_model)
        self.parts, self.tick = parts, tick
        self.sampler = Sampler(parts, features, self._progress)
        self._tokens = 0

    @property
    def cost(self) -> CacheCost:
        """What keys and values cost on the rank with the most layers."""
        config, layout = self.parts.config, self.parts.runtime.layout
        stages = plan_stages(
            config.model.text.num_layers, layout.pp, layout.vpp, config.parallel.pipeline_decoder_layers
        )
        layers = max(sum(len(stage.layers) for stage in rank) for rank in stages)
        value_bytes = torch.finfo(self.parts.dtype).bits // 8
        return cache_cost(config.model, layers, layout.tp, value_bytes, config.generate.kv_cache_gib)

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, on_token: OnToken | None = None
    ) -> list[Response]:
        """As `Rollouts.generate`. on_token: told of the tokens of this rank's requests as they come.

        Raises:
            ConfigError, DataError: see `check_requests` and `CacheCost.rows`, before anything is drawn.
        """
        model, config = self.parts.config.model, self.parts.config.generate
        check_requests(requests, params, model)
        layout, coords = self.parts.runtime.layout, self.parts.runtime.coords
        shares = share(requests, layout.dp * layout.cp)
        plans = [
            cut_batches(requests, part, params.max_tokens, self.cost, config.max_rows) for part in shares
        ]
        mine = plans[coords.dp * layout.cp + coords.cp]
        version = weight_version(self.parts)
        found: dict[int, Drawn] = {}
        with sampling_mode(self.parts):
            for indices in mine:
                found |= self.sampler.batch(requests, indices, params, on_token)
            while not self._meet(done=True):
                pass
        return self._exchange(requests, found, version)

    def _progress(self) -> None:
        self.tick()
        self._tokens += 1
        if self._tokens % MEET_EVERY == 0:
            self._meet(done=False)

    def _meet(self, done: bool) -> bool:
        """Whether all DP x CP ranks have drawn their share. Meeting on the way keeps collectives from timing out."""
        flag = torch.tensor([int(done)], device=self.parts.runtime.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.parts.runtime.groups.dp_cp)
        if done:
            self._tokens = 0
            self.tick()
        return bool(flag.item())

    def _exchange(self, requests, found: dict[int, Drawn], version: str) -> list[Response]:
        group = self.parts.runtime.groups.dp_cp
        everyone: list[dict[int, Drawn]] = [{} for _ in range(group.size())]
        dist.all_gather_object(everyone, found, group=group)
        drawn = {index: row for part in everyone for index, row in part.items()}
        assert sorted(drawn) == list(range(len(requests))), "every request is drawn once"
        return [
            Response(
                request.prompt.prompt_id,
                request.sample_index,
                request.seed,
                version,
                tuple(drawn[index].tokens),
                tuple(drawn[index].logprobs),
                drawn[index].finish_reason,
            )
            for index, request in enumerate(requests)
        ]
