"""Which rank generates what, and how many rows at once: from lengths and a memory budget, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_vl.config.model import ModelConfig
from megatron_vl.errors import ConfigError
from megatron_vl.generate.request import Request
from megatron_vl.plan.cost import parameters

GIB = 1 << 30
LOCAL_LIMIT = 1_000_000_000  # parameters; above, a batch without a paged cache wastes most of its memory


@dataclass(frozen=True)
class CacheCost:
    """Bytes of the KV cache on one rank. token: of one token of one row, over all of the rank's layers."""

    token: int
    budget: int

    def rows(self, longest: int) -> int:
        """Rows of ``longest`` tokens that the budget holds.

        Raises:
            ConfigError: not even one.
        """
        rows = self.budget // (self.token * longest) if self.token else self.budget
        if rows < 1:
            raise ConfigError(
                f"generate.kv_cache_gib = {self.budget / GIB:.3g}: one row of {longest} tokens (prompt and max_tokens) "
                f"needs {self.token * longest / GIB:.3g} GiB of keys and values on a rank; raise it, lower max_tokens, "
                "or use more tensor or pipeline parallel ranks"
            )
        return rows

    def describe(self, longest: int) -> str:
        """For the console."""
        row = self.token * longest
        return (
            f"KV cache: {self.token:,} bytes per token and rank, {row / (1 << 20):,.1f} MiB per row of {longest:,} "
            f"tokens, {self.rows(longest)} rows in {self.budget / GIB:.3g} GiB"
        )


def cache_cost(
    model: ModelConfig, layers: int, tensor_parallel: int, value_bytes: int, gib: float
) -> CacheCost:
    """layers: of the fullest pipeline rank. Keys and values of the rank's heads; at least one group per rank."""
    groups = max(model.text.num_query_groups // tensor_parallel, 1)
    return CacheCost(2 * layers * groups * model.text.kv_channels * value_bytes, int(gib * GIB))


def refuse_large(model: ModelConfig, allowed: bool) -> None:
    """``local`` rollouts are for small models.

    Raises:
        ConfigError: the model is above 1B parameters and it was not asked for all the same.
    """
    total = parameters(model)["total"]
    if total > LOCAL_LIMIT and not allowed:
        raise ConfigError(
            f"rollouts by the local sampler: the model has {total:,} parameters, more than {LOCAL_LIMIT:,}. Its KV "
            "cache has no pages and its batches are not refilled, so most of memory and time would be wasted; use a "
            "rollout server, or set generate.allow_large_model=true"
        )


def share(requests: Sequence[Request], ranks: int) -> list[list[int]]:
    """Indices of the requests of each of ``ranks`` ranks, longest prompts first.

    The samples of a prompt stay together, since they share its first pass; where there are fewer prompts than ranks
    they are dealt out one by one.
    """
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt.ids), _key(requests[i]), i))
    units = [list(group) for _, group in groupby(order, key=lambda i: _key(requests[i]))]
    if len(units) < ranks:
        units = [[i] for i in order]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for unit in units:
        min(shares, key=len).extend(unit)
    return shares


def cut_batches(
    requests: Sequence[Request], indices: Sequence[int], max_tokens: int, cost: CacheCost, max_rows: int
) -> list[list[int]]:
    """``indices`` in runs that fit: each row has room for the longest prompt of its batch and ``max_tokens``."""
    batches: list[list[int]] = []
    longest = 0
    for index in indices:
        length = len(requests[index].prompt.ids) + max_tokens
        grown = max(longest, length)
        full = batches and len(batches[-1]) >= min(max_rows, cost.rows(grown))
        if not batches or full:
            batches.append([])
            grown = length
        cost.rows(grown)
        longest = grown
        batches[-1].append(index)
    return batches


def distinct_prompts(requests: Sequence[Request], indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """(an index for each distinct prompt of a batch, for each row the number of its prompt)."""
    numbers: dict[tuple, int] = {}
    firsts: list[int] = []
    for index in indices:
        if _key(requests[index]) not in numbers:
            numbers[_key(requests[index])] = len(firsts)
            firsts.append(index)
    return firsts, [numbers[_key(requests[index])] for index in indices]


def _key(request: Request) -> tuple:
    """What makes two prompts the same: what they show the model, and whose they are."""
    return request.prompt.prompt_id, request.prompt.ids, request.prompt.images
