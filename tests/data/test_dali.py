"""DALI as a back end: the pixels of Pillow, the refusals of Pillow and a few more, in any process."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vl.config.schema import DataConfig
from megatron_vl.data.batch import MicroBatch
from megatron_vl.data.decode import DecodeRule
from megatron_vl.data.image_backend import PillowBackend, image_backend
from megatron_vl.data.lengths import made_from
from megatron_vl.data.loader import Place, eval_loader, train_loader
from megatron_vl.errors import ConfigErrors, ImageRefused
from megatron_vl.plan import image_checks
from megatron_vl.plan.image_checks import dali_is_installed
from tests.data.test_decode import BAD_FILES, CASES, GOLDEN, encoded, exif, noise, png
from tests.data.tiny import MODEL, chat, make_data, write_jsonl

needs_dali = pytest.mark.skipif(not dali_is_installed(), reason="needs NVIDIA DALI: pip install '.[dali]'")
DALI = DataConfig(image_backend="dali", dali_device="cpu")


@pytest.fixture(scope="module")
def dali():
    from megatron_vl.data.dali import DaliBackend

    return DaliBackend(mode="fast", device="cpu")


def both(dali, data, mode: str = "fast", **rule) -> tuple[tuple, tuple]:
    """Views by DALI and by Pillow."""
    found = []
    for backend in (dali, PillowBackend()):
        backend = replace(backend, mode=mode, decode_rule=DecodeRule(**rule))
        found.append(backend.views(data, backend.plan(backend.header(data).size)))
    return tuple(found)


def check_equal(dali, data, mode: str = "fast", **rule) -> None:
    for ours, theirs in zip(*both(dali, data, mode, **rule), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@needs_dali
@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("name", ["a01", "a02", "a03", "a04", "a05", "a06", "a09"])
def test_golden_pictures_are_equal(dali, name, mode):
    case = next(case for key, case in CASES.items() if key.startswith(name))
    check_equal(dali, GOLDEN / case["file"], mode, alpha=case["alpha"] or "white")


@needs_dali
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_orientation(dali, kind, orientation):
    options = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif(orientation)}
    data = encoded(noise(40, 24), kind, **options)
    check_equal(dali, data)
    check_equal(dali, data, apply_exif=False)


FORMATS = {
    "grey": encoded(noise(33, 21, 1), "PNG"),
    "palette": encoded(noise(33, 21).quantize(16), "PNG"),
    "bilevel": encoded(noise(33, 21, 1).convert("1"), "PNG"),
    "rgb16": png(4, 4, 16, 2, b"\x40\x00\x80\x00\xff\x00" * 4),
    "rgba16": png(4, 4, 16, 6, b"\x40\xff\x80\x00\xff\x01\x7f\xf0" * 4),
    "progressive": encoded(noise(33, 21), "JPEG", progressive=True),
    "grey jpeg": encoded(noise(33, 21, 1), "JPEG"),
    "cmyk": encoded(noise(33, 21).convert("CMYK"), "JPEG"),
    "cmyk tiff": encoded(noise(33, 21).convert("CMYK"), "TIFF"),
    "webp": encoded(noise(33, 21), "WEBP"),
    "bmp": encoded(noise(33, 21), "BMP"),
    "tiff": encoded(noise(33, 21), "TIFF"),
    "two pictures": encoded(noise(33, 21), "MPO", save_all=True, append_images=[noise(9, 9)]),
    "rgba": encoded(noise(33, 21, 4), "PNG"),
    "rgba webp": encoded(noise(33, 21, 4), "WEBP", lossless=True),
}


@needs_dali
@pytest.mark.parametrize("name", FORMATS)
def test_formats(dali, name):
    check_equal(dali, FORMATS[name])
    check_equal(dali, FORMATS[name], alpha="drop")


@needs_dali
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(dali, name):
    data, reason = BAD_FILES[name]
    with pytest.raises(ImageRefused) as refusal:
        dali.pixels(data)
    assert refusal.value.reason in (reason, "corrupt") or "GIF" in name
    check_equal(dali, FORMATS["webp"])  # and the next image is read


@needs_dali
def test_every_cut_of_a_file_is_refused_or_whole(dali):
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        data = encoded(noise(24, 16), kind)
        whole = dali.pixels(data).clone()
        for length in range(0, len(data), 97):
            try:
                assert torch.equal(dali.pixels(data[:length]), whole), (kind, length)
            except ImageRefused as refusal:
                assert refusal.detail


@needs_dali
def test_what_dali_cannot_read_is_refused_by_its_header(dali):
    grey_alpha = encoded(Image.new("LA", (8, 8), (9, 100)), "PNG")
    for data, reason in (
        (encoded(noise(9, 9), "GIF"), "unsupported_format"),
        (grey_alpha, "unsupported_mode"),
    ):
        with pytest.raises(ImageRefused, match="data.image_backend=torch") as refusal:
            dali.header(data)
        assert refusal.value.reason == reason
    check_equal(dali, grey_alpha, alpha="drop")


@needs_dali
def test_a_changed_file_and_a_copy_for_another_process(dali):
    data = FORMATS["webp"]
    with pytest.raises(ImageRefused, match="when its views were planned"):
        dali.views(data, dali.plan((5, 5)))
    again = pickle.loads(pickle.dumps(dali))
    assert again == dali and again._pipelines == {} and dali._pipelines
    assert torch.equal(again.pixels(data), dali.pixels(data))


@needs_dali
def test_why_dalis_own_resize_is_not_used():
    """Should this fail, DALI treats borders as Pillow does, and may resize on the GPU as well."""
    from nvidia.dali import Pipeline, fn, types

    picture = noise(1920, 1080)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        source = fn.external_source(name="source", dtype=types.UINT8, ndim=3, layout="HWC")
        pipeline.set_outputs(
            fn.resize(source, size=(728, 728), interp_type=types.INTERP_LINEAR, antialias=True)
        )
    pipeline.build()
    pipeline.feed_input("source", [np.array(picture)])
    theirs = np.array(pipeline.run()[0].as_array()[0]).astype(int)
    off = np.abs(theirs - np.array(picture.resize((728, 728), Image.Resampling.BILINEAR)))
    assert off.max() > 10 and off[1:-1, 1:-1].max() <= 2


def same(one: MicroBatch, other: MicroBatch) -> bool:
    return torch.equal(one.crop_pixels, other.crop_pixels) and torch.equal(
        one.global_pixels, other.global_pixels
    )


@needs_dali
def test_in_worker_processes_and_beside_bad_images(tmp_path):
    data = make_data(tmp_path, image_mode="fast", image_backend="dali", dali_device="cpu", seq_length=64)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.gif")
    records = [
        chat("q", "a", "small.png", "cut.jpg", id="cut off"),
        chat("q", "a", "a.gif", id="gif"),
        chat("q", "a", "wide.png", id="fine"),
    ]
    path = write_jsonl(tmp_path / "train.jsonl", records)
    data = replace(data, train=[path], eval=[path])
    batch = eval_loader(data, MODEL, Place(), 3, 3).next_step()[0]
    assert [(bad.id, bad.reason) for bad in batch.refused] == [("gif", "unsupported_format")]
    assert [(bad.document, bad.record.reason) for bad in batch.failed] == [(0, "corrupt")]
    by_pillow = eval_loader(replace(data, image_backend="torch"), MODEL, Place(), 3, 3).next_step()[0]
    assert torch.equal(by_pillow.crop_pixels[-3:], batch.crop_pixels[-3:])
    background = train_loader(replace(data, num_workers=1), MODEL, Place(), 3, 3, timeout_seconds=200)
    inline = train_loader(data, MODEL, Place(), 3, 3)
    assert all(same(*pair) for pair in zip(inline.next_step(), background.next_step(), strict=True))
    background.close()


def test_not_installed_is_an_error_and_nothing_takes_its_place(monkeypatch):
    monkeypatch.setattr(image_checks, "dali_is_installed", lambda: False)
    with pytest.raises(ConfigErrors, match="NVIDIA DALI is not installed; pip install"):
        image_backend(replace(DALI, image_mode="fast"), MODEL)
    assert isinstance(image_backend(DataConfig(), MODEL), PillowBackend)


def test_the_gpu_is_for_mode_fast():
    with pytest.raises(ConfigErrors, match="tolerance of data.image_mode = fast only"):
        image_backend(replace(DALI, dali_device="mixed"), MODEL)


def test_the_length_index_knows_who_refuses(tmp_path):
    from megatron_vl.data.jsonl import JsonlSource
    from megatron_vl.data.rows import RowBuilder

    data = make_data(tmp_path, train=[write_jsonl(tmp_path / "t.jsonl", [chat()])])
    builder = RowBuilder(data, MODEL)
    of_pillow = made_from(JsonlSource(data.train), builder)
    builder.data = replace(data, image_mode="fast")
    assert made_from(JsonlSource(data.train), builder) == of_pillow
    builder.data = replace(data, image_backend="dali")
    assert made_from(JsonlSource(data.train), builder) != of_pillow
