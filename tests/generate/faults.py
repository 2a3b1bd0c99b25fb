"""Faults of a sampler that the comparison with plain decoding must find, planted on the rank for one job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from megatron_vl.generate import sampler
from megatron_vl.generate.forward import Forward
from megatron_vl.model.kv_cache import KVCache
from tests.generate.on_ranks import responses_on_rank


def rotated_too_late() -> Any:
    """Each drawn token gets the angles of the position behind its own."""
    real = Forward.tokens

    def tokens(self, ids, positions, reach):
        self.angles = self.angles.roll(-1, 0)
        try:
            return real(self, ids, positions, reach)
        finally:
            self.angles = self.angles.roll(1, 0)

    return mock.patch.object(Forward, "tokens", tokens)


def sees_padding() -> Any:
    """Every row looks at as many keys as the longest one."""
    real = KVCache.at

    def at(self, positions, reach):
        real(self, positions, reach)
        if self._seen is not None:
            self._seen = torch.ones_like(self._seen)

    return mock.patch.object(KVCache, "at", at)


def written_at_the_end_of_the_longest() -> Any:
    """New keys go behind the longest row's instead of behind the row's own."""
    real = KVCache._keep

    def keep(self, layer, k, v):
        mine, self.positions = (
            self.positions,
            None if self.positions is None else torch.full_like(self.positions, self.reach - 1),
        )
        real(self, layer, k, v)
        self.positions = mine

    return mock.patch.object(KVCache, "_keep", keep)


def rows_mixed_up() -> Any:
    """When rows are left behind, the others get each other's keys."""
    real = KVCache.take
    return mock.patch.object(KVCache, "take", lambda self, rows: real(self, rows.flip(0)))


def last_of_the_padding() -> Any:
    """The first token is drawn behind the padding instead of behind the prompt."""
    real = Forward.prompts

    def prompts(self, ids, lengths, features, names):
        return real(self, ids, torch.full_like(lengths, ids.shape[1]), features, names)

    return mock.patch.object(Forward, "prompts", prompts)


def structural_ids_allowed() -> Any:
    return mock.patch.object(sampler, "forbidden_ids", lambda model: ())


FAULTS: dict[str, Callable[[], Any]] = {
    fault.__name__: fault
    for fault in (
        rotated_too_late, sees_padding, written_at_the_end_of_the_longest, rows_mixed_up, last_of_the_padding,
    )
}  # fmt: skip


def planted_on_rank(fault: str, *args: Any) -> list:
    """`responses_on_rank` with a fault."""
    with FAULTS[fault]():
        return responses_on_rank(*args)


def allowed_on_rank(*args: Any) -> list:
    """The same with structural ids among those that are drawn."""
    with structural_ids_allowed():
        return responses_on_rank(*args)
