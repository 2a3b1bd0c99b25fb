"""Gradients summed beside the backward pass and weights gathered beside the forward pass change no number."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.parity.compare import Assembled, relative
from tests.fixtures.small import SMALL, make_documents
from tests.model.on_ranks import gradients, run_of
from tests.train.overlap_on_ranks import passes_on_rank, planted, trained_on_rank

# Rows of both micro-batches of two replicas. In the last pass one replica has no image at all, and each rank of the
# other a micro-batch without; in the first pass it was the other way round.
VIEW, TEXT = ([(1, 2), (0, 0)], 6), ([], 9)
FIRST = make_documents(SMALL, [TEXT, VIEW, TEXT, VIEW], seed=8)
LAST = make_documents(SMALL, [VIEW, TEXT, TEXT, ([], 11)])
ON = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}
CHUNKS = RecomputeConfig(vision_chunk_views=1)
FULL = RecomputeConfig(decoder="full", vision="full")


@pytest.fixture(scope="module")
def expected(world):
    """(loss, gradients) of the last pass on one rank, without overlap."""
    return gradients(world, SMALL, "1", "data", LAST)


CASES = [
    ("dp2", "data", SMALL, {}, None),
    ("dp2", "data", SMALL, {"use_distributed_optimizer": False, "overlap_param_gather": None}, CHUNKS),
    ("dp2tp2sp", "data", SMALL, {}, CHUNKS),
    ("dp2cp2", "data", SMALL, {}, FULL),
    ("dp2tp2pp2", "tensor", SMALL, {}, None),
    ("dp2pp2vpp2", "data", SMALL, {}, None),
    ("dp2", "data", replace(SMALL, freeze_decoder=True), {}, CHUNKS),
    ("dp2tp2", "tensor", replace(SMALL, freeze_vision=True), {}, None),
]


@pytest.mark.parametrize(("layout", "placement", "model", "keys", "recompute"), CASES)
def test_gradients(world, expected, layout, placement, model, keys, recompute):
    runs = [
        run_of(model, layout, placement, docs, recompute=recompute, **(ON | keys))
        for docs in (FIRST, FIRST, LAST)
    ]
    config, batches, place = runs[-1]
    answers = world.run(place.world_size, passes_on_rank, config, [rows for _, rows, _ in runs])
    found = Assembled([answer.seen for answer in answers], place, batches, LAST, model).gradients()
    assert answers[0].seen.losses[0] == pytest.approx(expected[0], rel=1e-6)
    far = {name: relative(grad, expected[1][name]) for name, grad in found.items()}
    assert {name: value for name, value in far.items() if not value < 5e-5} == {}
    for rank, answer in enumerate(answers):  # every bucket once, in the same order on every rank of a stage
        peers = [a for r, a in enumerate(answers) if place.coords(r).pp == place.coords(rank).pp]
        assert all(a.sent == answer.sent and a.early == answer.early for a in peers)
        assert len(set(answer.sent)) == len(answer.sent) == answer.groups
    assert answers[0].groups > 2
    assert (answers[0].early > 1) != model.freeze_decoder


@pytest.mark.parametrize(
    ("layout", "placement", "keys"),
    [
        ("dp2", "data", {}),
        ("dp2", "data", {"use_distributed_optimizer": False, "overlap_param_gather": None}),
        ("dp2cp2tp2sp", "data", {}),
        ("dp2pp2vpp2", "tensor", {}),
    ],
)
def test_three_steps(world, layout, placement, keys):
    """Losses, norms and weights, with a step between that is skipped; weights arrive as they do, and as late as they
    may."""
    docs = [FIRST, LAST, FIRST[::-1]]
    answers = []
    for overlap, late in ((False, False), (True, False), (True, True)):
        on = (ON if overlap else {}) | keys
        runs = [run_of(SMALL, layout, placement, rows, recompute=CHUNKS, **on) for rows in docs]
        config, _, place = runs[0]
        late = late and config.parallel.overlap_param_gather is not None
        answers.append(world.run(place.world_size, trained_on_rank, config, [r for _, r, _ in runs], late))
    for plain, *others in zip(*answers):
        for other in others:
            for (loss, norm, skipped), (loss_2, norm_2, skipped_2) in zip(plain.steps, other.steps):
                assert not skipped and not skipped_2
                assert loss_2 == pytest.approx(loss, rel=1e-6) and norm_2 == pytest.approx(norm, rel=1e-5)
            assert plain.weights.keys() == other.weights.keys()
            for name, weight in plain.weights.items():
                assert torch.allclose(other.weights[name], weight, atol=2e-6), name


def test_a_weight_that_nobody_waits_for_is_seen(world):
    runs = [run_of(SMALL, "dp2", "data", rows, **ON) for rows in (FIRST, LAST)]
    answers = world.run(2, trained_on_rank, runs[0][0], [rows for _, rows, _ in runs], True, True)
    assert all(answer.steps[1][2] for answer in answers)


def test_the_towers_buckets_cannot_be_sent_as_the_decoders(world):
    """What happens without ``late``: a pass without images never sends them."""
    runs = [
        run_of(SMALL, "1", "data", docs, **ON) for docs in (FIRST, FIRST, make_documents(SMALL, [TEXT] * 4))
    ]
    (said,) = world.run(1, planted, runs[0][0], [rows for _, rows, _ in runs])
    assert "Communication call has not been issued for this bucket" in said
