"""What is asked of a sampler: rules, seeds, refusals."""

from dataclasses import replace

import pytest

from megatron_vl.config.model import SpecialTokens
from megatron_vl.errors import ConfigError, ConfigErrors, DataError
from megatron_vl.generate.request import (
    Prompt,
    Request,
    SamplingParams,
    check_requests,
    end_ids,
    forbidden_ids,
    requests_for,
    sample_seed,
)
from megatron_vl.plan.vision_share import CROP, GLOBAL
from tests.fixtures.small import SMALL

TOKENS = SMALL.tokens


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
        ({"temperature": -0.1}, "temperature = -0.1: must be a finite number of at least 0"),
        ({"temperature": float("inf")}, "temperature = inf: must be a finite number"),
        ({"temperature": float("nan")}, "temperature = nan: must be a finite number"),
        ({"top_p": 0.0}, "top_p = 0.0: must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p = 1.01: must be above 0"),
        ({"top_k": -1}, "top_k = -1: must be at least 0"),
    ],
)
def test_bad_parameters_are_refused(change, told):
    with pytest.raises(ConfigErrors, match="1 problem") as caught:
        SamplingParams(**{"max_tokens": 4, **change})
    assert told in str(caught.value)


def test_seeds_follow_from_the_place_in_the_run_alone():
    assert sample_seed(1, 2, "a", 3) == 3692764328661748617
    places = [(r, i, p, s) for r in (0, 1) for i in (0, 1) for p in ("a", "b", "0/a") for s in (0, 1)]
    seeds = [sample_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 1 << 63 for seed in seeds)
    prompts = [Prompt("a", (1,)), Prompt("b", (2,))]
    found = list(requests_for(prompts, 2, run_seed=1, iteration=2))
    assert [(r.prompt.prompt_id, r.sample_index) for r in found] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [r.seed for r in found] == [sample_seed(1, 2, p, s) for p in "ab" for s in (0, 1)]


def test_what_the_template_writes_is_never_sampled_and_what_ends_a_turn_may_be():
    never = forbidden_ids(SMALL)
    assert {TOKENS.im_patch, TOKENS.im_start, TOKENS.patch_newline, TOKENS.chat_start} <= set(never)
    assert not set(end_ids(TOKENS)) & set(never)
    assert TOKENS.think_start not in never
    few = replace(SMALL, text=replace(SMALL.text, vocab_size=300), tokens=SpecialTokens(im_patch=0))
    assert forbidden_ids(few) == (0,)  # a vocabulary without the others


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (Prompt("p", ()), "prompt p: no token"),
        (Prompt("p", (1, 512)), "prompt p: ids from 1 to 512, the model has 0 to 511"),
        (Prompt("p", (-1,)), "ids from -1 to -1"),
        (Prompt("p", (1, TOKENS.im_patch)), "1 <im_patch> ids, but its 0 views make 0 features"),
        (Prompt("p", (1,), (GLOBAL,), ("d",)), "0 <im_patch> ids, but its 1 views make 4 features"),
        (Prompt("p", (1, *[TOKENS.im_patch] * 4), (CROP,), ("d",)), "its 1 views make 1 features"),
        (Prompt("p", (1,) * 65533), "65533 tokens and max_tokens = 4 are more than"),
    ],
)
def test_impossible_prompts_are_refused_before_anything_is_drawn(prompt, told):
    good = Request(Prompt("good", (1, 2)), 0, 0)
    check_requests([good], SamplingParams(4), SMALL)
    with pytest.raises(DataError) as caught:
        check_requests([good, Request(prompt, 0, 0)], SamplingParams(4), SMALL)
    assert told in str(caught.value)


def test_a_vocabulary_of_structural_ids_is_refused():
    tokens = SpecialTokens(*range(100, 105), im_patch=0, im_start=1, im_end=2)
    model = replace(SMALL, tokens=tokens, text=replace(SMALL.text, vocab_size=3))
    with pytest.raises(ConfigError, match="no id is left"):
        check_requests([], SamplingParams(1), model)
