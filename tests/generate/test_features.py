"""Image features: computed once per image by all ranks together, and what damages them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.sample import parse_sample
from megatron_vl.parity.layouts import parse_layout
from tests.data.tiny import MODEL, chat, make_data
from tests.generate.features_on_ranks import ensured_on_rank, fused_on_rank, refused_on_rank

FROZEN = replace(MODEL, freeze_vision=True, freeze_projector=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    config = make_data(folder)
    shutil.copy(folder / "wide.png", folder / "same.png")  # other name, same content
    return config


def samples(*pictures: tuple[str, ...]) -> list:
    records = [chat("What colour?", "red", *names, id=f"s{i}") for i, names in enumerate(pictures)]
    return [parse_sample(json.dumps(record).encode(), "x:1") for record in records]


ASKED = samples(("wide.png", "small.png"), ("same.png",), (), ("whole.jpg",))  # three different images


def run_of(layout: str, data, placement: str = "data", model=FROZEN) -> tuple[int, RunConfig]:
    named = parse_layout(layout, placement, "cpu")
    return named.world_size, RunConfig(model=model, parallel=named.parallel, data=data)


@pytest.fixture(scope="module")
def single(world, data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("single"))
    return world.run(1, ensured_on_rank, run_of("1", data)[1], ASKED, folder)[0]


def test_each_image_is_computed_once(single):
    assert single["counts"] == [(0, 3, 0), (3, 3, 0)]
    # wide and whole have 3 crops and a global view each, in two sizes; small has a global view
    assert single["runs"] == 5
    assert sorted(len(rows) for rows in single["features"].values()) == [4, 7, 7]


@pytest.mark.parametrize(
    ("layout", "placement"),
    [
        ("dp2", "data"),
        ("tp2cp2", "tensor"),
        ("pp2", "all"),
        pytest.param("tp2pp2", "data", marks=pytest.mark.slow),
        pytest.param("cp2", "data", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_share_the_work_and_get_the_same(world, data, tmp_path, single, layout, placement):
    ranks, config = run_of(layout, data, placement)
    answers = world.run(ranks, ensured_on_rank, config, ASKED, str(tmp_path))
    sharded = 2 if placement == "tensor" else 1
    assert sum(answer["runs"] for answer in answers) == 5 * sharded
    assert max(answer["runs"] for answer in answers) < 5
    for answer in answers:
        assert answer["counts"] == [(0, 3, 0), (3, 3, 0)]
        for digest, rows in (answer["features"] or {}).items():
            assert torch.allclose(rows, single["features"][digest], atol=1e-5)
        for (tokens, logprobs), (tokens_1, logprobs_1) in zip(answer["answers"], single["answers"]):
            assert tokens == tokens_1 and logprobs == pytest.approx(logprobs_1, abs=1e-5)
    # another run over the same folder computes nothing, in any layout
    again = world.run(1, ensured_on_rank, run_of("1", data)[1], ASKED, str(tmp_path))[0]
    assert again["counts"] == [(3, 0, 0), (6, 0, 0)] and again["runs"] == 0


def test_damaged_entries_are_computed_again_and_counted(world, data, tmp_path, single):
    config = run_of("1", data)[1]
    world.run(1, ensured_on_rank, config, ASKED, str(tmp_path))
    entries = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(entries) == 3
    damaged = bytearray(entries[0].read_bytes())
    damaged[-1] ^= 1
    entries[0].write_bytes(damaged)
    entries[1].write_bytes(entries[1].read_bytes()[:50])
    found = world.run(1, ensured_on_rank, config, ASKED, str(tmp_path))[0]
    assert found["counts"] == [(1, 2, 2), (4, 2, 2)]
    assert found["answers"] == single["answers"]


def test_other_weights_and_other_rules_make_other_entries(world, data, tmp_path):
    config = run_of("1", data)[1]
    for number, (changed, change) in enumerate(
        [
            (config, 0.0),
            (config, 1e-3),
            (replace(config, data=replace(data, alpha="drop")), 0.0),
            (replace(config, data=replace(data, boundary_rule="lt")), 0.0),
        ]
    ):
        found = world.run(1, ensured_on_rank, changed, ASKED, str(tmp_path), change)[0]
        assert found["counts"][0] == (0, 3, 0), number


def test_training_takes_them_in_place_of_pixels(world, data, tmp_path):
    far = world.run(1, fused_on_rank, run_of("1", data)[1], ASKED, str(tmp_path))[0]
    assert len(far) == 4 and max(far) < 1e-5


def test_an_image_that_cannot_be_decoded_is_named_on_every_rank(world, data, tmp_path):
    ranks, config = run_of("dp2", data)
    broken = [*ASKED, *samples(("cut.jpg",))]
    for told in world.run(ranks, refused_on_rank, config, broken, str(tmp_path)):
        assert told.startswith("image features:\n  image ") and "cut.jpg: truncated" in told
