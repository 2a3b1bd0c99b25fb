"""What must not depend on the layout: freezing, recompute, text-only batches, who has the images."""

from dataclasses import replace

import pytest

from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.parity.compare import relative
from tests.fixtures.small import SMALL, make_documents
from tests.model.on_ranks import gradients, steps

# Dense rows: two micro-batches, the second without images. One view: with two vision ranks, one has none.
ONE_VIEW = make_documents(SMALL, [([(0, 0)], 8), ([], 9)])
VIEWS = make_documents(SMALL, [([(1, 2), (0, 0)], 6), ([(2, 1)], 7)])
TEXT = make_documents(SMALL, [([], 8), ([], 11)])


@pytest.fixture(scope="module")
def plain(world):
    """(loss, gradients) of layout 1 by name of the documents."""
    return {
        name: gradients(world, SMALL, "1", "data", docs)
        for name, docs in (("one view", ONE_VIEW), ("views", VIEWS), ("text", TEXT))
    }


def part_of(name: str) -> str:
    if name.startswith("vision_model."):
        return "vision"
    return "projector" if name.startswith("vit_large_projector") else "decoder"


def assert_equal(found, expected, parts=("vision", "projector", "decoder")):
    """Loss, and the gradients of exactly these parts."""
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert set(found[1]) == {name for name in expected[1] if part_of(name) in parts}
    far = {name: relative(grad, expected[1][name]) for name, grad in found[1].items()}
    assert {name: value for name, value in far.items() if not value < 5e-5} == {}


FREEZING = [
    (part, *case)
    for part in ("vision", "projector", "decoder")
    for case in (("1", "data"), ("tp2", "data"), ("tp2sp", "tensor"), ("pp2", "data"), ("cp2", "data"))
]


@pytest.mark.parametrize(("part", "layout", "placement"), FREEZING)
def test_a_frozen_part_gets_no_gradient_and_the_others_theirs(world, plain, part, layout, placement):
    model = replace(SMALL, **{f"freeze_{part}": True})
    others = {"vision", "projector", "decoder"} - {part}
    assert_equal(gradients(world, model, layout, placement, ONE_VIEW), plain["one view"], others)


@pytest.mark.parametrize("trained", ["vision", "projector", "decoder"])
def test_one_part_alone(world, plain, trained):
    frozen = {f"freeze_{part}": True for part in ("vision", "projector", "decoder") if part != trained}
    for layout, placement in (("tp2pp2cp2sp", "data"), ("tp2pp2", "tensor")):
        found = gradients(world, replace(SMALL, **frozen), layout, placement, VIEWS)
        assert_equal(found, plain["views"], {trained})


@pytest.mark.parametrize("layout", ["pp2", "tp2pp2"])
def test_a_stage_without_anything_to_train_still_steps(world, layout):
    """Frozen decoder: the last stage has no trained parameter (Megatron-LM issue 1166)."""
    model = replace(SMALL, freeze_decoder=True)
    expected = steps(world, model, "1", "data", VIEWS, 3)
    assert expected[2][0] < expected[0][0]
    for (loss, norm), (loss_1, norm_1) in zip(steps(world, model, layout, "data", VIEWS, 3), expected):
        assert loss == pytest.approx(loss_1, rel=1e-5) and norm == pytest.approx(norm_1, rel=1e-4)


@pytest.mark.parametrize(
    "recompute",
    [
        RecomputeConfig(decoder="full"),
        RecomputeConfig(decoder="full", decoder_num_layers=2, vision="full", vision_num_layers=2),
        RecomputeConfig(decoder="selective"),
        RecomputeConfig(vision="full"),
    ],
    ids=lambda r: f"decoder-{r.decoder}-vision-{r.vision}",
)
def test_recompute_changes_nothing(world, plain, recompute):
    for layout, placement in (("1", "data"), ("tp2spcp2", "tensor")):
        assert_equal(gradients(world, SMALL, layout, placement, VIEWS, recompute=recompute), plain["views"])


def test_recompute_with_a_frozen_tower_or_decoder(world, plain):
    both = RecomputeConfig(decoder="full", vision="full")
    for part, others in (("vision", {"projector", "decoder"}), ("decoder", {"vision", "projector"})):
        model = replace(SMALL, **{f"freeze_{part}": True})
        found = gradients(world, model, "tp2sp", "data", ONE_VIEW, recompute=both)
        assert_equal(found, plain["one view"], others)


@pytest.mark.parametrize(
    ("layout", "placement"), [("1", "data"), ("tp2sp", "data"), ("dp2tp2pp2", "tensor"), ("cp2", "data")]
)
def test_text_only_batches_train_with_zero_vision_gradients(world, plain, layout, placement):
    found = gradients(world, SMALL, layout, placement, TEXT)
    assert_equal(found, plain["text"])
    sizes = {name: grad.norm().item() for name, grad in found[1].items()}
    assert {name for name, size in sizes.items() if size == 0} == {
        n for n in sizes if part_of(n) != "decoder"
    }


def test_images_may_be_on_either_data_parallel_rank(world, plain):
    for docs in (ONE_VIEW, ONE_VIEW[::-1]):
        found = gradients(world, SMALL, "dp2", "data", docs)
        assert_equal(found, plain["one view"])


def test_without_the_distributed_optimizer(world, plain):
    found = gradients(world, SMALL, "dp2cp2tp2sp", "data", VIEWS, use_distributed_optimizer=False)
    assert_equal(found, plain["views"])


def test_uneven_stages(world, plain):
    for layers in ([0, 4], [1, 3], [3, 1], [4, 0]):
        found = gradients(world, SMALL, "pp2", "data", VIEWS, pipeline_decoder_layers=layers)
        assert_equal(found, plain["views"])


def test_gradient_norm_is_equal_in_every_layout(world):
    """Shards count once each, copies once in all: the clipped step depends on it."""
    expected = steps(world, SMALL, "1", "data", VIEWS, 2)
    for layout, placement in (
        ("tp2sp", "data"),
        ("tp2sp", "tensor"),
        ("tp2pp2cp2sp", "data"),
        ("dp2", "data"),
    ):
        for found, wanted in zip(steps(world, SMALL, layout, placement, VIEWS, 2), expected):
            assert found == pytest.approx(wanted, rel=1e-4)
