"""The benchmarks at sizes that take seconds: they measure, check what they computed, and write it down."""

import json

import pytest
import torch

from megatron_vl.bench import images, loss
from megatron_vl.bench.pictures import jpeg, photo_like
from megatron_vl.bench.reference_views import decoded, in_8_bits, in_float
from megatron_vl.data.crops import plan_crops
from megatron_vl.data.decode import load_rgb, make_views
from megatron_vl.plan.image_checks import dali_is_installed
from tools.benchmark_throughput import main

TINY = ["images", "--sizes", "160x120", "740x300", "--repeats", "2", "--warm-up", "0"]


def test_images(tmp_path, capsys):
    assert main([*TINY, "--json", str(tmp_path / "images.json")]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "images.json").read_text())
    assert [result["crops"] for result in record["sizes"]] == [0, 2]
    ways = {"reference", "exact torch", "fast torch"} | (
        {"exact dali", "fast dali"} if dali_is_installed() else set()
    )
    for result in record["sizes"]:
        assert {row["way"] for row in result["rows"]} == ways and result["bits_per_pixel"] > 0.5
        for row in result["rows"]:
            rate = row["images_per_processor_second"]
            assert 0 < rate["min"] <= rate["median"] <= rate["max"] and row["within"] and row["way"] in text
            assert ("device" in row["milliseconds"]) == row["way"].startswith("fast")
    assert record["sizes"][0]["rows"][0]["times_the_reference"] == {"median": 1, "min": 1, "max": 1}


def test_wrong_pixels_are_found(monkeypatch, capsys):
    """Planted: views that are not those of the picture."""
    monkeypatch.setattr(images, "in_float", lambda *args: tuple(views + 0.1 for views in in_float(*args)))
    assert main(TINY) == 1
    assert "160x120" in capsys.readouterr().out


def test_too_slow_is_an_error_on_request_only(monkeypatch):
    monkeypatch.setattr(images, "ASKED", {"exact": 1e9, "fast": 1e9})
    small = [*TINY[:3], *TINY[4:]]
    assert main(small) == 0 and main([*small, "--require"]) == 1


def test_loss(monkeypatch, capsys):
    small = ["loss", "--tokens", "256", "--words", "2000", "--hidden", "32", "--chunk", "32"]
    assert main(small) == 0
    text = capsys.readouterr().out
    plain, chunked = (
        float(line.split()[1]) for line in text.splitlines() if line.startswith(("plain", "chunked"))
    )
    assert plain > 256 * 2000 * 4 / 2**20 and chunked < plain / 4
    monkeypatch.setattr(loss, "BOUND", 0.0)
    assert main(small) == 1


def test_a_bad_command(tmp_path):
    assert (
        main([*TINY[:3], "--repeats", "1", "--warm-up", "0", "--json", str(tmp_path / "no" / "f.json")]) == 2
    )
    with pytest.raises(SystemExit):
        main(["pictures"])


@pytest.mark.parametrize("size", [(300, 200), (700, 300), (1000, 300), (100, 20), (3100, 500)])
def test_the_reference_is_the_released_processing(size):
    data, plan = jpeg(photo_like(*size), 90), plan_crops(*size)
    ours = make_views(load_rgb(data), plan)
    for view, other in zip(in_float(in_8_bits(decoded(data), plan), 728, 504), ours, strict=True):
        assert torch.equal(view, other)


def test_pictures_are_drawn_from_their_seed():
    assert (
        photo_like(64, 48).tobytes() == photo_like(64, 48).tobytes() != photo_like(64, 48, seed=1).tobytes()
    )
    assert 1 < 8 * len(jpeg(photo_like(640, 480), 90)) / (640 * 480) < 3
