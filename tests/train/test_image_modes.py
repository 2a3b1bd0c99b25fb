"""A training step in each image mode: close to each other, equal in every layout and back end."""

from pathlib import Path

import pytest
from PIL import Image

from megatron_vl.plan.image_checks import dali_is_installed
from tests.data.tiny import chat, write_jsonl
from tests.train import on_ranks
from tests.train.tiny_run import load, make_files, read_lines, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight samples, four of them with pictures of noise, which resizing changes most."""
    folder = make_files(tmp_path_factory.mktemp("modes"), samples=4)
    lines = read_lines(folder / "train.jsonl")
    for number, size in enumerate([(96, 80), (160, 60), (333, 200), (200, 333)]):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"noise_{number}.png")
        lines.append(chat("What colour?", "red", f"noise_{number}.png", id=f"noise{number}"))
    write_jsonl(folder / "train.jsonl", lines)
    return folder


def first(world, data, tmp_path, ranks: int, layout: str, *overrides: str):
    config = load(write_config(data, tmp_path / f"run{abs(hash(overrides))}"), layout, *overrides)
    return world.run(ranks, on_ranks.first_step, config)


def test_fast_is_close_to_exact_and_alike_in_every_layout(world, data, tmp_path):
    exact = first(world, data, tmp_path, 1, "1")[0]
    fast = first(world, data, tmp_path, 1, "1", "data.image_mode=fast")[0]
    assert fast.tokens == exact.tokens
    assert fast.loss == pytest.approx(exact.loss, rel=1e-4) and fast.loss != exact.loss
    assert fast.grad_norm == pytest.approx(exact.grad_norm, rel=1e-2)
    for ranks, layout, placement in ((4, "tp2pp2", "data"), (4, "dp2tp2", "tensor"), (2, "cp2", "data")):
        overrides = ("data.image_mode=fast", f"parallel.vision_placement={placement}")
        for rank in first(world, data, tmp_path, ranks, layout, *overrides):
            assert rank.loss == pytest.approx(fast.loss, rel=1e-6), layout
            assert rank.grad_norm == pytest.approx(fast.grad_norm, rel=1e-5), layout


@pytest.mark.skipif(not dali_is_installed(), reason="needs NVIDIA DALI: pip install '.[dali]'")
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_dali_trains_on_the_same_pixels(world, data, tmp_path, mode):
    by_pillow = first(world, data, tmp_path, 1, "1", f"data.image_mode={mode}")[0]
    by_dali = first(world, data, tmp_path, 1, "1", f"data.image_mode={mode}", "data.image_backend=dali")[0]
    assert (by_dali.loss, by_dali.grad_norm) == (by_pillow.loss, by_pillow.grad_norm)
