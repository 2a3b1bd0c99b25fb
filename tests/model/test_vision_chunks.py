"""The tower a chunk of views at a time: the same gradients, and a peak that does not grow with the views."""

from dataclasses import replace

import pytest

from megatron_vl.config.schema import RecomputeConfig, RunConfig
from megatron_vl.parity.compare import relative
from tests.fixtures.small import SMALL, WIDE, make_documents
from tests.model.live_bytes import tower_gradients, tower_peak
from tests.model.on_ranks import gradients

VIEWS = make_documents(SMALL, [([(1, 2), (0, 0)], 6), ([(2, 1), (3, 1)], 7)])
ONE_VIEW = make_documents(SMALL, [([(0, 0)], 8), ([], 9)])


def described(vision: str, chunk: int | None, model=WIDE) -> RunConfig:
    return RunConfig(model=model, recompute=RecomputeConfig(vision=vision, vision_chunk_views=chunk))


def peaks(world, vision: str, chunk: int | None, *views: int, model=WIDE) -> dict[str, int]:
    return world.run(1, tower_peak, described(vision, chunk, model), *views)[0]


@pytest.mark.parametrize("vision", ["none", "full"])
def test_chunks_change_no_gradient_of_the_tower(world, vision):
    whole, ones, twos = (
        world.run(1, tower_gradients, described(vision, chunk), 3, 5)[0] for chunk in (None, 1, 2)
    )
    assert all(grad.norm() > 0 for grad in whole.values()) and len(whole) > 20
    for chunked in (ones, twos):
        assert max(relative(chunked[name], grad) for name, grad in whole.items()) < 1e-6  # fp64, but for RoPE


@pytest.mark.parametrize(
    ("layout", "placement", "vision"), [("tp2spcp2", "data", "none"), ("tp2", "tensor", "full")]
)
def test_chunks_change_nothing_in_a_step(world, layout, placement, vision):
    plain = gradients(world, SMALL, layout, placement, VIEWS)
    recompute = RecomputeConfig(vision=vision, vision_chunk_views=1)
    loss, found = gradients(world, SMALL, layout, placement, VIEWS, recompute=recompute)
    assert loss == pytest.approx(plain[0], rel=1e-6) and set(found) == set(plain[1])
    assert max(relative(grad, plain[1][name]) for name, grad in found.items()) < 1e-5


@pytest.mark.parametrize("frozen", ["vision", "projector", "decoder"])
def test_chunks_with_a_frozen_part_and_a_rank_without_views(world, frozen):
    model, recompute = replace(SMALL, **{f"freeze_{frozen}": True}), RecomputeConfig(vision_chunk_views=1)
    loss, found = gradients(world, model, "tp2sp", "data", ONE_VIEW, recompute=recompute)
    expected = gradients(world, model, "1", "data", ONE_VIEW)
    assert loss == pytest.approx(expected[0], rel=1e-6) and set(found) == set(expected[1])
    assert max(relative(grad, expected[1][name]) for name, grad in found.items()) < 5e-5


@pytest.mark.parametrize("vision", ["none", "full"])
def test_the_peak_of_a_chunk_does_not_grow_with_the_views(world, vision):
    two, eight = (peaks(world, vision, None, 0, views) for views in (2, 8))
    of_a_view = (eight["kept"] - two["kept"]) / 6
    assert eight["kept"] > 3.9 * two["kept"] > 100 * two["rows"]  # without chunks all activations stay
    short, long = (peaks(world, vision, 1, 0, views) for views in (2, 8))
    grown = long["rows"] - short["rows"]
    for found in (short, long):
        assert (
            found["kept"] <= found["rows"] + 64
        )  # only the features stay, and what makes chunks go backward
        assert found["left"] <= 64
    # what grows with the views is their features, joined, and the gradient of them
    assert long["peak"] - short["peak"] <= 4 * grown < 0.2 * of_a_view
    assert eight["peak"] - long["peak"] >= 6.5 * of_a_view
    # crops as well, and both kinds in turn
    mixed = peaks(world, vision, 1, 6, 4)
    assert mixed["peak"] - short["peak"] <= 4 * (mixed["rows"] - short["rows"])


def test_a_frozen_tower_works_through_its_views_in_chunks(world):
    model = replace(WIDE, freeze_vision=True)
    whole, chunked = (peaks(world, "none", chunk, 0, 8, model=model)["peak"] for chunk in (None, 1))
    assert chunked < 0.25 * whole
