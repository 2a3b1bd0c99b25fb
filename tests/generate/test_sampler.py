"""The sampler against whole forward passes of the training model, in every kind of layout."""

from dataclasses import replace

import pytest

from megatron_vl.checkpoint.hf_load import HFCheckpoint
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.schema import GenerateConfig, PrecisionConfig, RecomputeConfig, RunConfig
from megatron_vl.generate.request import (
    LENGTH,
    STOP,
    Request,
    SamplingParams,
    forbidden_ids,
    requests_for,
    sample_seed,
)
from megatron_vl.generate.rollout import MEET_EVERY
from megatron_vl.parity.layouts import parse_layout
from megatron_vl.parity.reference import documents, read_reference
from tests.fixtures.small import SMALL, make_documents
from tests.fixtures.unseen import no_token_table, six_heads, three_layers
from tests.generate.faults import FAULTS, allowed_on_rank, planted_on_rank
from tests.generate.on_ranks import (
    asked_of,
    backend_on_rank,
    plain_on_rank,
    responses_on_rank,
    sampled_and_scored_on_rank,
    trained_on_rank,
)
from tests.model.on_ranks import run_of as described

TOLERANCE = 1e-5  # between log-probabilities in fp32, as promised in docs/generation.md
# 50 prompts of 3 to 60 tokens: two images, crops in rows and columns, a small image, none.
SPECS = [([(1, 2), (0, 0)], 6), ([], 9), ([(2, 1)], 7), ([(0, 0)], 3), ([], 24)] * 10
ASKED = [asked_of(document, SMALL) for document in make_documents(SMALL, SPECS)]
ENDS = tuple(range(256, 330))  # many, so that rows end at different times
GREEDY = SamplingParams(8, temperature=0.0, stop_ids=ENDS)
SLOW = pytest.mark.slow
LAYOUTS = (
    "1",
    "tp2pp2sp",
    "dp2",
    "cp2",
    "pp2vpp2",
    *(pytest.param(name, marks=SLOW) for name in ("tp2", "tp4", "pp2")),
)


def run_of(layout: str, model=SMALL, placement: str = "data", **changes) -> tuple[int, RunConfig]:
    named = parse_layout(layout, placement, "cpu")
    return named.world_size, RunConfig(model=model, parallel=named.parallel, **changes)


def sample(world, layout: str, asked, requests, params, source=None, **changes) -> list:
    """Responses in a layout; every rank has the same."""
    ranks, config = run_of(layout, **changes)
    answers = world.run(ranks, responses_on_rank, config, asked, requests, params, source)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def assert_equal(responses, plain) -> None:
    """Tokens and log-probabilities are those of plain decoding."""
    for response, (tokens, logprobs) in zip(responses, plain, strict=True):
        assert response.tokens == tokens, response.prompt_id
        assert response.logprobs == pytest.approx(logprobs, abs=TOLERANCE), response.prompt_id
        assert response.finish_reason == (STOP if tokens[-1] in ENDS else LENGTH)


@pytest.fixture(scope="module")
def plain(world):
    return world.run(1, plain_on_rank, run_of("1")[1], ASKED, GREEDY.max_tokens, ENDS)[0]


def test_plain_decoding_is_worth_comparing_with(plain):
    """Responses differ, some end early, some at once; no two prompts get the same by accident."""
    lengths = [len(tokens) for tokens, _ in plain]
    assert min(lengths) == 1 and max(lengths) == 8 and 1.5 < sum(lengths) / 50 < 7.5
    assert len({tokens for tokens, _ in plain}) > 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_and_logprobs_are_those_of_plain_decoding(world, plain, layout):
    requests = list(requests_for([one.prompt for one in ASKED], 1, 0))
    assert_equal(sample(world, layout, ASKED, requests, GREEDY), plain)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("1", {"generate": GenerateConfig(max_rows=7)}),
        ("1", {"generate": GenerateConfig(max_rows=1)}),
        ("tp2sp", {"placement": "tensor", "recompute": RecomputeConfig(decoder="full", vision="full")}),
        ("cp2", {"generate": GenerateConfig(kv_cache_gib=3e-4), "recompute": RecomputeConfig("selective")}),
    ],
)
def test_batch_sizes_recompute_and_placement_change_nothing(world, plain, layout, changes):
    chosen = [0, 1, 2, 3, 4, 11, 19, 33]
    requests = list(requests_for([ASKED[i].prompt for i in chosen], 1, 0))
    found = sample(world, layout, [ASKED[i] for i in chosen], requests, GREEDY, **changes)
    assert_equal(found, [plain[i] for i in chosen])


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(world, plain, fault):
    chosen = [0, 1, 2, 3, 4, 11, 19, 33]
    requests = list(requests_for([ASKED[i].prompt for i in chosen], 1, 0))
    found = world.run(
        1, planted_on_rank, fault, run_of("1")[1], [ASKED[i] for i in chosen], requests, GREEDY
    )[0]
    with pytest.raises(AssertionError):
        assert_equal(found, [plain[i] for i in chosen])


FEW = [ASKED[i] for i in (0, 1, 2, 3)]


@pytest.mark.parametrize("layout", ["1", "tp2pp2sp", "cp2", pytest.param("dp2", marks=SLOW)])
def test_logprobs_are_those_of_the_training_forward_in_the_same_layout(world, layout):
    ranks, config = run_of(layout)
    params = SamplingParams(6, 0.8, top_p=0.9, top_k=50)
    requests = list(requests_for([one.prompt for one in FEW], 2, 5))
    answers = world.run(ranks, sampled_and_scored_on_rank, config, FEW, requests, params, 80)
    responses = answers[0][0]
    scored: dict[int, list[float]] = {}
    cp = config.parallel.context_parallel_size
    for _, scores in answers:
        for number, values in scores.items():
            # under context parallelism each rank has some positions; tensor-parallel ranks have the same ones
            scored[number] = sorted({*scored.get(number, []), *values}) if cp > 1 else values
    for number, response in enumerate(responses):
        assert scored[number] == pytest.approx(sorted(response.logprobs), abs=TOLERANCE)


@pytest.mark.slow
def test_in_bf16_logprobs_are_near(world):
    """spec: at most 4e-3 apart on a tiny model; the numbers differ with the shapes of batches."""
    ranks, config = run_of("tp2pp2sp", precision=PrecisionConfig(params="bf16"))
    requests = list(requests_for([one.prompt for one in FEW], 2, 5))
    answers = world.run(ranks, sampled_and_scored_on_rank, config, FEW, requests, SamplingParams(6), 80)
    scored = {number: values for _, scores in answers for number, values in scores.items()}
    for number, response in enumerate(answers[0][0]):
        assert scored[number] == pytest.approx(sorted(response.logprobs), abs=0.1)


DRAWN = SamplingParams(6, temperature=1.0, stop_ids=ENDS)


@pytest.fixture(scope="module")
def drawn(world):
    requests = list(requests_for([one.prompt for one in FEW], 3, 7))
    return requests, sample(world, "1", FEW, requests, DRAWN)


@pytest.mark.parametrize("layout", ["1", "cp2", *(pytest.param(name, marks=SLOW) for name in ("tp2", "pp2"))])
def test_a_response_is_drawn_again_from_its_seed_in_other_company(world, drawn, layout):
    requests, responses = drawn
    assert len({(r.prompt_id, r.tokens) for r in responses}) > 9  # samples of a prompt differ
    for picked in ([4], [11, 2, 7, 3, 9]):
        found = sample(world, layout, FEW, [requests[i] for i in picked], DRAWN)
        for response, number in zip(found, picked, strict=True):
            assert response.tokens == responses[number].tokens
            assert response.logprobs == pytest.approx(responses[number].logprobs, abs=TOLERANCE)
            assert response.weight_version == responses[number].weight_version


def test_other_seeds_draw_other_tokens(world, drawn):
    requests, responses = drawn
    others = [replace(r, seed=sample_seed(8, 0, r.prompt.prompt_id, r.sample_index)) for r in requests]
    found = sample(world, "1", FEW, others, DRAWN)
    assert sum(a.tokens == b.tokens for a, b in zip(found, responses)) <= 2


def test_structural_ids_are_never_drawn_and_stop_ids_end_a_response(world):
    """Hot enough that every id is drawn; the released list of ends names <im_patch>, which every prompt here has."""
    ends = (SMALL.tokens.chat_end, SMALL.tokens.endoftext, SMALL.tokens.im_patch)
    requests = list(requests_for([FEW[0].prompt], 150, 1))
    responses = sample(world, "1", FEW[:1], requests, SamplingParams(12, 1000.0, stop_ids=ends))
    ids = [token for response in responses for token in response.tokens]
    assert len(ids) > 1500 and len(set(ids)) > 450
    assert not set(ids) & set(forbidden_ids(SMALL)) and max(ids) < SMALL.text.vocab_size
    hot = run_of("1")[1], FEW[:1], requests, SamplingParams(12, 1000.0, stop_ids=ends)
    allowed = world.run(1, allowed_on_rank, *hot)[0]
    assert {token for response in allowed for token in response.tokens} & set(forbidden_ids(SMALL))
    stopped = [response for response in responses if response.finish_reason == STOP]
    assert len(stopped) >= 3
    for response in responses:
        ended = [token in ends for token in response.tokens]
        assert not any(ended[:-1]) and ended[-1] == (response.finish_reason == STOP)
        assert len(response.tokens) == 12 or response.finish_reason == STOP


@pytest.mark.parametrize("limit", [1, 2])
def test_a_response_has_at_most_max_tokens(world, limit):
    requests = list(requests_for([one.prompt for one in FEW], 1, 1))
    for response in sample(world, "1", FEW, requests, SamplingParams(limit)):
        assert len(response.tokens) == len(response.logprobs) == limit and response.finish_reason == LENGTH


@pytest.mark.parametrize("layout", ["1", "tp2pp2sp"])
def test_training_goes_on_as_if_nothing_had_been_sampled(world, layout):
    documents = make_documents(SMALL, SPECS[:4])
    config, batches, place = described(SMALL, layout, "data", documents)
    (plain, _), (found, versions) = (
        world.run(place.world_size, trained_on_rank, config, batches, FEW, sampling)[0]
        for sampling in (False, True)
    )
    assert found == plain and plain[2][0] < plain[0][0]
    assert len(set(versions)) == 3  # every step makes another one


def test_ranks_that_end_early_wait_for_the_others(world, plain):
    """One row at a time: more tokens in a row than ranks draw between two meetings, and not equally many."""
    requests = list(requests_for([one.prompt for one in ASKED], 1, 0))
    assert sum(len(tokens) for tokens, _ in plain) > 3 * MEET_EVERY
    found = sample(world, "dp2", ASKED, requests, GREEDY, generate=GenerateConfig(max_rows=1))
    assert_equal(found, plain)


def test_nothing_asked_nothing_drawn_also_on_ranks_without_a_request(world):
    assert sample(world, "dp2", [], [], DRAWN) == []
    (response,) = sample(world, "dp2", FEW[1:2], [Request(FEW[1].prompt, 0, 3)], DRAWN)
    assert response.tokens


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (six_heads, "tp2"),
        pytest.param(three_layers, "pp2", marks=SLOW),
        pytest.param(no_token_table, "1", marks=SLOW),
    ],
)
def test_unseen_models(world, tmp_path, make, layout):
    folder = make(tmp_path / "model")
    model = model_from_hf(str(folder))
    source = HFCheckpoint(folder).tensor
    found = documents(read_reference(folder / "reference.safetensors"), model)
    asked = [asked_of(document, model) for document in found]
    ranks, config = run_of("1", model=model)
    plain = world.run(1, plain_on_rank, config, asked, 8, ENDS, source)[0]
    requests = list(requests_for([one.prompt for one in asked], 1, 0))
    responses = sample(world, layout, asked, requests, GREEDY, source, model=model)
    for response, (tokens, logprobs) in zip(responses, plain, strict=True):
        assert response.tokens == tokens
        assert response.logprobs == pytest.approx(logprobs, abs=TOLERANCE)


def test_another_backend_is_refused(world):
    (told,) = world.run(1, backend_on_rank, run_of("1")[1])
    assert told.endswith("this model has OtherAttention; set parallel.layer_backend=torch")
