"""Random numbers and the choice of tokens: distributions, cuts, what is never chosen."""

import math

import pytest
import torch

from megatron_vl.generate.choose import choose, cut_off
from megatron_vl.generate.noise import MASK, mix, uniform
from megatron_vl.generate.request import SamplingParams

NONE = torch.tensor([], dtype=torch.int64)
LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0, 2.0]])


def seeds_of(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64)


def drawn(logits: torch.Tensor, params: SamplingParams, draws: int, forbidden: torch.Tensor = NONE):
    rows = logits.expand(draws, -1)
    return choose(rows, params, forbidden, seeds_of(draws), torch.zeros(draws, dtype=torch.int64))


def split_mix(state: int) -> int:
    """The generator's output function with Python's integers."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_mixing_is_that_of_splitmix64():
    values = [0, 1, -1, 2**62, -(2**63), 1234567890123456789]
    found = [value & MASK for value in mix(torch.tensor(values)).tolist()]
    assert found == [split_mix(value) for value in values]


def test_random_numbers_are_a_function_of_seed_and_number_and_look_uniform():
    seeds, numbers = torch.tensor([5, 5, 6, 2**62]), torch.tensor([0, 1, 0, 7])
    whole = uniform(seeds, numbers, 1000)
    alone = uniform(seeds[2:3], numbers[2:3], 10)
    assert torch.equal(alone[0], whole[2, :10])
    assert len(whole.flatten().unique()) == whole.numel()
    assert whole.min() > 0 and whole.max() < 1
    many = uniform(seeds_of(2000), torch.zeros(2000, dtype=torch.int64), 50)
    # mean and variance of all, and of each column over neighbouring seeds: six standard errors
    for values in (many.flatten(), *many.T):
        error = 6 / math.sqrt(12 * len(values))
        assert values.mean().item() == pytest.approx(0.5, abs=error)
        assert values.var().item() == pytest.approx(1 / 12, abs=error)
    near = torch.corrcoef(
        torch.stack([many[:, 0], many[:, 1], uniform(seeds_of(2000), seeds_of(2000), 1)[:, 0]])
    )
    assert (near - torch.eye(3)).abs().max() < 6 / math.sqrt(2000)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax(temperature):
    draws = 20000
    ids, logprobs = drawn(LOGITS, SamplingParams(1, temperature), draws)
    expected = torch.softmax(LOGITS[0].double() / temperature, dim=0)
    seen = torch.bincount(ids, minlength=5) / draws
    assert ((seen - expected).abs() < 6 * (expected * (1 - expected) / draws).sqrt()).all()
    # whatever the temperature, the log-probability is the model's own
    assert torch.allclose(logprobs, torch.log_softmax(LOGITS[0].double(), dim=0)[ids])


def test_temperature_zero_takes_the_most_probable_one():
    ids, logprobs = drawn(LOGITS, SamplingParams(1, 0.0), 3)
    assert ids.tolist() == [1, 1, 1]
    assert logprobs.tolist() == pytest.approx([math.log(0.52927)] * 3, abs=1e-4)


def test_forbidden_ids_are_never_drawn_and_keep_their_probability():
    for temperature in (0.0, 1.0, 100.0):
        ids, logprobs = drawn(LOGITS, SamplingParams(1, temperature), 500, torch.tensor([1, 4]))
        assert not set(ids.tolist()) & {1, 4}
        assert torch.allclose(logprobs, torch.log_softmax(LOGITS[0].double(), dim=0)[ids])
    padded = torch.cat([LOGITS, torch.full((1, 3), -torch.inf)], dim=1)  # rows that only pad a vocabulary
    assert drawn(padded, SamplingParams(1, 100.0), 500)[0].max() < 5


def kept(top_k: int, top_p: float) -> set[int]:
    cut = cut_off(LOGITS.double(), top_k, top_p)
    assert torch.equal(cut[cut > -torch.inf], LOGITS.double()[cut > -torch.inf])
    return set(cut[0].isfinite().nonzero()[:, 0].tolist())


def test_cuts():
    # probabilities: id 1 .529, ids 2 and 4 .195 each, id 0 .072, id 3 .010; the former of equals goes first
    assert kept(0, 1.0) == {0, 1, 2, 3, 4}
    assert kept(1, 1.0) == {1} and kept(2, 1.0) == {1, 2} and kept(9, 1.0) == {0, 1, 2, 3, 4}
    assert kept(0, 0.001) == {1} and kept(0, 0.5) == {1}
    assert kept(0, 0.54) == {1, 2} and kept(0, 0.75) == {1, 2, 4} and kept(0, 0.95) == {0, 1, 2, 4}
    # of the two that top_k leaves, the first has .73
    assert kept(2, 0.7) == {1} and kept(2, 0.74) == {1, 2}


def test_cut_draws_stay_inside_the_cut():
    assert set(drawn(LOGITS, SamplingParams(1, 5.0, top_k=2), 400)[0].tolist()) == {1, 2}
    assert set(drawn(LOGITS, SamplingParams(1, 1.0, top_p=0.75), 400)[0].tolist()) == {1, 2, 4}


def test_a_rounding_difference_hardly_changes_a_draw():
    """Walking along a cumulative sum over a flat vocabulary of this size would change some of these draws."""
    logits = torch.randn(1, 20000, generator=torch.Generator().manual_seed(1)) * 0.1
    other = logits + 1e-6 * torch.randn(1, 20000, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(1)
    assert torch.equal(drawn(logits, params, 100)[0], drawn(other, params, 100)[0])
