"""Who generates what, and how many rows at once."""

from dataclasses import replace

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.errors import ConfigError
from megatron_vl.generate.batches import (
    CacheCost,
    cache_cost,
    cut_batches,
    distinct_prompts,
    refuse_large,
    share,
)
from megatron_vl.generate.request import Prompt, requests_for
from tests.fixtures.small import SMALL


def asked(lengths: list[int], samples: int = 1) -> list:
    return list(requests_for([Prompt(f"p{i}", (1,) * n) for i, n in enumerate(lengths)], samples, 0))


def test_bytes_of_the_released_model():
    """144 KiB per token in bf16 (spec/rl.md 8): 2 x 36 layers x 8 groups x 128 x 2."""
    cost = cache_cost(ModelConfig(), 36, 1, 2, 10.0)
    assert cost.token == 144 * 1024
    assert cost.rows(65536) == 1
    assert "147,456 bytes per token and rank, 9,216.0 MiB per row of 65,536 tokens, 1 rows" in cost.describe(
        65536
    )
    assert cache_cost(ModelConfig(), 9, 4, 2, 10.0).token == 144 * 1024 // 16
    assert cache_cost(ModelConfig(), 36, 16, 2, 10.0).token == 144 * 1024 // 8  # a group is not cut


def test_a_row_that_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(
        ConfigError, match=r"generate.kv_cache_gib = 0.5: one row of 65536 tokens .* needs 9 GiB"
    ):
        cache_cost(ModelConfig(), 36, 1, 2, 0.5).rows(65536)


def test_large_models_are_refused_unless_asked_for():
    refuse_large(SMALL, False)
    refuse_large(ModelConfig(), True)
    with pytest.raises(ConfigError, match=r"10,171,750,144 parameters.*generate.allow_large_model=true"):
        refuse_large(ModelConfig(), False)


@pytest.mark.parametrize(
    ("ranks", "samples", "prompts"), [(1, 2, 5), (2, 3, 5), (3, 1, 3), (4, 6, 2), (8, 1, 3)]
)
def test_every_request_goes_to_one_rank_and_shares_are_even(ranks, samples, prompts):
    requests = asked([10 * (i + 1) for i in range(prompts)], samples)
    shares = share(requests, ranks)
    assert sorted(i for part in shares for i in part) == list(range(len(requests)))
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= (samples if prompts >= ranks else 1)
    if prompts >= ranks:  # the samples of a prompt stay together
        where = {requests[i].prompt.prompt_id: rank for rank, part in enumerate(shares) for i in part}
        assert all(
            where[requests[i].prompt.prompt_id] == rank for rank, part in enumerate(shares) for i in part
        )
    for part in shares:
        lengths = [len(requests[i].prompt.ids) for i in part]
        assert lengths == sorted(lengths, reverse=True)


def test_batches_keep_to_the_budget():
    requests = asked([100, 90, 40, 30, 20, 10])
    order = share(requests, 1)[0]
    cost = CacheCost(token=1, budget=220)
    batches = cut_batches(requests, order, 10, cost, 256)
    assert batches == [[0, 1], [2, 3, 4, 5]]
    assert all(len(b) * (max(len(requests[i].prompt.ids) for i in b) + 10) <= 220 for b in batches)
    assert cut_batches(requests, order, 10, cost, 3) == [[0, 1], [2, 3, 4], [5]]
    assert cut_batches(requests, [], 10, cost, 3) == []
    assert cut_batches(requests, [5, 0], 10, CacheCost(1, 120), 9) == [[5], [0]]  # a longer one comes later
    with pytest.raises(ConfigError, match="one row of 110 tokens"):
        cut_batches(requests, order, 10, CacheCost(1, 109), 9)


def test_samples_of_a_prompt_share_its_first_pass():
    requests = asked([5, 5], samples=2)
    twin = replace(requests[0], prompt=replace(requests[0].prompt, images=("other",)))
    firsts, rows = distinct_prompts([*requests, twin], [2, 0, 3, 1, 4])
    assert (firsts, rows) == ([2, 0, 4], [0, 1, 0, 1, 2])
