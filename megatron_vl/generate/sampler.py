"""Batches of requests into responses, on the ranks of one model replica."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_vl.generate.batches import distinct_prompts
from megatron_vl.generate.choose import choose
from megatron_vl.generate.forward import Forward
from megatron_vl.generate.request import LENGTH, STOP, Prompt, Request, SamplingParams, forbidden_ids
from megatron_vl.train.build import Parts

# Projected features of images in the order of their digests: [rows, h] on the device.
Features = Callable[[Sequence[str]], torch.Tensor]
# Told of every sampled token as it comes: index of the request, id.
OnToken = Callable[[int, int], None]


@dataclass
class Drawn:
    """What a row has so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""


class Sampler:
    """Draws tokens on the ranks of a replica, which all call it alike.

    features: asked on the first stage only. tick: called with every token, as a sign of progress.
    """

    def __init__(self, parts: Parts, features: Features, tick: Callable[[], None]) -> None:
        self.parts, self.features, self.tick = parts, features, tick
        self.forward = Forward(parts)
        device = parts.runtime.device
        self.device = device
        self.forbidden = torch.tensor(forbidden_ids(parts.config.model), dtype=torch.int64, device=device)

    def batch(
        self,
        requests: Sequence[Request],
        indices: Sequence[int],
        params: SamplingParams,
        on_token: OnToken | None = None,
    ) -> dict[int, Drawn]:
        """The responses of ``requests[i]`` for i in ``indices``, at once. Samples of a prompt share its first pass."""
        firsts, rows = distinct_prompts(requests, indices)
        prompts = [requests[i].prompt for i in firsts]
        longest = max(len(prompt.ids) for prompt in prompts)
        with self.forward.batch(len(prompts), longest + params.max_tokens) as cache:
            lengths = self._ints([len(prompt.ids) for prompt in prompts])
            logits = self.forward.prompts(
                self._padded(prompts, longest),
                lengths,
                self._features(prompts),
                [p.prompt_id for p in prompts],
            )
            which = self._ints(rows)
            if rows != list(range(len(prompts))):
                cache.take(which)
                logits = None if logits is None else logits[which]
            return self._draw(requests, list(indices), lengths[which], longest, logits, params, on_token)

    def _draw(self, requests, order, positions, reach, logits, params, on_token) -> dict[int, Drawn]:
        """Token by token until every row has ended. order: the request of each row that is still carried."""
        drawn = {index: Drawn() for index in order}
        seeds = self._ints([requests[index].seed for index in order])
        for number in range(params.max_tokens):
            ids = self._next(logits, params, seeds, number, drawn, order, on_token)
            self.tick()
            alive = [row for row, index in enumerate(order) if not drawn[index].finish_reason]
            if not alive:
                break
            if 2 * len(alive) <= len(order):  # ended rows cost as much as the others: leave them behind
                keep = self._ints(alive)
                self.forward.cache.take(keep)
                ids, positions, seeds = ids[keep], positions[keep], seeds[keep]
                order = [order[row] for row in alive]
            reach += 1
            logits = self.forward.tokens(ids, positions, reach)
            positions = positions + 1
        return drawn

    def _next(self, logits, params, seeds, number, drawn, order, on_token) -> torch.Tensor:
        """Draw on the last stage, tell every rank of the replica, write down. Returns ids int64 ``[b]``."""
        groups = self.parts.runtime.groups
        told = torch.zeros((2, len(order)), dtype=torch.float64, device=self.device)  # holds every id exactly
        if logits is not None:
            told = torch.stack(
                [
                    x.double()
                    for x in choose(logits, params, self.forbidden, seeds, torch.full_like(seeds, number))
                ]
            )
            if groups.tp.size() > 1:  # equal there already; what is fed back must not hang on that
                dist.broadcast(told, src=dist.get_global_rank(groups.tp, 0), group=groups.tp)
        if groups.pp.size() > 1:
            last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
            dist.broadcast(told, src=last, group=groups.pp)
        ids, logprobs = told[0].long(), told[1].tolist()
        for index, token, logprob in zip(order, ids.tolist(), logprobs, strict=True):
            row = drawn[index]
            if row.finish_reason:
                continue
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if token in params.stop_ids:
                row.finish_reason = STOP
            elif len(row.tokens) == params.max_tokens:
                row.finish_reason = LENGTH
            if on_token is not None:
                on_token(index, token)
        return ids

    def _features(self, prompts: Sequence[Prompt]) -> torch.Tensor | None:
        images = [image for prompt in prompts for image in prompt.images]
        if not images or not self.parts.runtime.is_first_stage:
            return None
        return self.features(images)

    def _padded(self, prompts: Sequence[Prompt], longest: int) -> torch.Tensor:
        """int64 ``[b, longest]``; padding is no image slot and never looked at."""
        padding = self.parts.config.model.text.vocab_size - 1
        padding = padding - 1 if padding == self.parts.config.model.tokens.im_patch else padding
        return self._ints([[*prompt.ids, *[padding] * (longest - len(prompt.ids))] for prompt in prompts])

    def _ints(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
