"""FP8 in the model: near the gradients without it, and the same in every tensor-parallel layout."""

from dataclasses import replace

import pytest

from megatron_vl.config.schema import PrecisionConfig, RecomputeConfig
from megatron_vl.parity.compare import Assembled, relative
from tests.fixtures.small import SMALL, make_documents
from tests.model.fp8_on_ranks import delayed_on_rank, gradients_with_own_scales, quantised_names
from tests.model.on_ranks import gradients_on_rank, run_of

DOCS = make_documents(SMALL, [([(1, 2), (0, 0)], 19), ([], 21)])
TENSORWISE = PrecisionConfig(fp8="tensorwise")
BOTH = PrecisionConfig(fp8="tensorwise", fp8_vision=True)


def described(
    layout: str, placement: str, precision: PrecisionConfig, recompute: RecomputeConfig | None = None
):
    config, batches, place = run_of(SMALL, layout, placement, DOCS, recompute=recompute)
    assert batches.seq_length % 16 == 0, batches.seq_length
    return replace(config, precision=precision), batches, place


def gradients(world, layout, placement, precision, recompute=None, function=gradients_on_rank):
    """(loss, gradients by released name)."""
    config, batches, place = described(layout, placement, precision, recompute)
    seen = world.run(place.world_size, function, config, batches)
    return seen[0].losses[0], Assembled(seen, place, batches, DOCS, SMALL).gradients()


@pytest.fixture(scope="module")
def one_rank(world):
    """By precision."""
    return {p: gradients(world, "1", "data", p) for p in (PrecisionConfig(), TENSORWISE, BOTH)}


def far(found, expected) -> dict[str, float]:
    return {name: relative(grad, expected[1][name]) for name, grad in found[1].items()}


def test_as_far_from_fp32_as_the_formats_make_it(one_rank):
    plain = one_rank[PrecisionConfig()]
    for precision in (TENSORWISE, BOTH):
        assert one_rank[precision][0] == pytest.approx(plain[0], rel=0.02)
        errors = far(one_rank[precision], plain)
        layers = [value for name, value in errors.items() if ".layers." in name and "proj.weight" in name]
        assert len(layers) == 7 * 4 and all(0.01 < value < 0.3 for value in layers), layers


@pytest.mark.parametrize(
    ("layout", "placement", "precision"),
    [
        ("tp2", "data", TENSORWISE),
        ("tp2sp", "data", TENSORWISE),  # a tower's scale is that of the views that a rank encodes together
        ("dp2tp2pp2sp", "tensor", BOTH),
    ],
)
def test_the_same_over_tensor_parallel_ranks(world, one_rank, layout, placement, precision):
    """Scales are those of whole tensors. What is left: values between two FP8 numbers that fp32 noise tips over."""
    found = gradients(world, layout, placement, precision)
    assert found[0] == pytest.approx(one_rank[precision][0], rel=1e-3)
    errors = far(found, one_rank[precision])
    assert {name: value for name, value in errors.items() if not value < 0.01} == {}


def test_scales_of_parts_are_found(world, one_rank):
    found = gradients(world, "tp2", "data", TENSORWISE, function=gradients_with_own_scales)
    assert max(far(found, one_rank[TENSORWISE]).values()) > 0.02


def test_recomputed_layers_round_alike(world, one_rank):
    found = gradients(
        world, "1", "data", BOTH, RecomputeConfig(decoder="full", vision="full", vision_chunk_views=2)
    )
    errors = far(found, one_rank[BOTH])  # chunks of views have scales of their own
    decoder = {name: value for name, value in errors.items() if ".layers." in name and "proj.weight" in name}
    assert max(decoder.values()) < 0.05


def test_which_layers(world):
    precision = replace(TENSORWISE, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
    config, _, place = described("pp2", "data", precision)
    names = [name for rank in world.run(place.world_size, quantised_names, config) for name in rank]
    assert sorted(names) == sorted(
        f"language_model.decoder.layers.1.{name}"
        for name in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
    )
    config, _, _ = described("1", "data", BOTH)
    (names,) = world.run(1, quantised_names, config)
    assert len(names) == 4 * 4 + 4 * 2 and sum("vision_model.transformer" in name for name in names) == 8


def test_delayed(world):
    """Histories are equal on all ranks that share a weight, newest first; a step later scales come from them."""
    delayed = PrecisionConfig(fp8="delayed", fp8_amax_history_len=4)
    answers = {}
    for layout in ("1", "dp2tp2sp"):
        config, batches, place = described(layout, "data", delayed)
        answers[layout] = world.run(place.world_size, delayed_on_rank, config, batches, 3)
    (alone,) = answers["1"]
    assert len(alone["histories"]) == 16 and alone["losses"][2] < alone["losses"][0]
    for answer in answers["dp2tp2sp"]:
        assert answer["losses"] == pytest.approx(alone["losses"], rel=5e-3)
        for name, history in answer["histories"].items():
            assert (history[:3] > 0).all() and (history[3:] == 0).all()
            assert relative(history, alone["histories"][name]) < 0.02, name
            assert (history == answers["dp2tp2sp"][0]["histories"][name]).all()
