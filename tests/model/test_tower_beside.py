"""Placement `all`: the tower beside the pipeline gives the same loss, gradients, norm and weights as on one rank."""

from dataclasses import replace

import pytest

from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.parity.compare import relative
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.vision_share import share_step
from tests.fixtures.small import SMALL, make_documents
from tests.model.on_ranks import gradients, run_of, stepped_on_rank

VIEWS = make_documents(SMALL, [([(1, 2), (0, 0)], 6), ([], 9), ([(2, 1)], 7), ([(3, 1)], 5)])
ONE_VIEW = make_documents(SMALL, [([], 9), ([(0, 0)], 8)])
CHUNKS = RecomputeConfig(vision="full", vision_chunk_views=1)


def assert_near(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and set(found[1]) == set(expected[1])
    far = {name: relative(grad, expected[1][name]) for name, grad in found[1].items()}
    assert {name: value for name, value in far.items() if not value < 5e-5} == {}


@pytest.mark.parametrize(
    ("layout", "docs", "recompute", "frozen"),
    [
        ("pp4", VIEWS, CHUNKS, None),
        ("tp2sppp2", ONE_VIEW, None, "vision"),
        ("pp2vpp2", VIEWS, CHUNKS, "vision"),
        ("pp2cp2", VIEWS, None, "projector"),
        ("pp2", ONE_VIEW, None, "decoder"),
        pytest.param("tp2pp2", VIEWS, CHUNKS, "projector", marks=pytest.mark.slow),
        pytest.param("tp4", VIEWS, None, None, marks=pytest.mark.slow),
    ],
)
def test_gradients_with_waves_frozen_parts_and_ranks_without_views(world, layout, docs, recompute, frozen):
    model = SMALL if frozen is None else replace(SMALL, **{f"freeze_{frozen}": True})
    expected = gradients(world, model, "1", "data", docs)
    assert_near(gradients(world, model, layout, "all", docs, recompute=recompute), expected)
    place = run_of(model, layout, "all", docs)[2]
    shares = share_step([doc.kinds for doc in docs], place.vision_size, view_costs(model), together=True)
    lone = [all(not mine[rank] for mine in shares) for rank in range(place.vision_size)]
    assert any(lone) == (docs is ONE_VIEW), "ranks without a view take part"


def test_nothing_of_the_vision_part_is_trained(world):
    model = replace(SMALL, freeze_vision=True, freeze_projector=True)
    expected = gradients(world, model, "1", "data", VIEWS)
    assert_near(gradients(world, model, "pp2", "all", VIEWS), expected)
    assert not any("vision" in name or "projector" in name for name in expected[1])


@pytest.mark.parametrize(("layout", "distributed"), [("tp2pp2", True), ("tp2pp2", False), ("dp2pp2", True)])
def test_steps_norms_and_copies(world, layout, distributed):
    """The norm counts every gradient once, and no copy of the tower drifts by a bit."""
    config, batches, place = run_of(SMALL, "1", "data", VIEWS)
    (expected,) = world.run(1, stepped_on_rank, config, batches, 3)
    config, batches, place = run_of(SMALL, layout, "all", VIEWS, use_distributed_optimizer=distributed)
    answers = world.run(place.world_size, stepped_on_rank, config, batches, 3)
    for answer in answers:
        for (loss, norm), (loss_1, norm_1) in zip(answer.steps, expected.steps, strict=True):
            assert loss == pytest.approx(loss_1, rel=1e-5) and norm == pytest.approx(norm_1, rel=1e-5)
    assert len({answer.tower for answer in answers}) == 1 and answers[0].tower
