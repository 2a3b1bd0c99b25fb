"""Decoding and views against the golden pictures, and every way in which a file can be unusable."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from megatron_vl.data.crops import CropRule, plan_crops
from megatron_vl.data.decode import (
    CLIP_MEAN,
    CLIP_STD,
    DecodeRule,
    load_rgb,
    make_views,
    read_header,
)
from megatron_vl.data.image_backend import PillowBackend
from megatron_vl.data.image_checks import REASONS, resolve_under
from megatron_vl.errors import DataError, ImageRefused

GOLDEN = Path(__file__).parent.parent / "golden" / "preprocess"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CASES = {case["id"]: case for case in EXPECTED["cases"]}
SAME_JPEG_DECODER = features.version("libjpeg_turbo") == EXPECTED["made_with"]["libjpeg_turbo"]


def encoded(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values)


def png(
    width: int, height: int, depth: int, color: int, row: bytes, before: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG of equal rows, for what Pillow cannot write. before, after: chunks around the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * min(height, 1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", pixels)
        + after
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("name", CASES)
def test_golden_views(name):
    case = CASES[name]
    crop_rule = CropRule(boundary_rule=case["rule"][:2])
    backend = PillowBackend(crop_rule, DecodeRule(alpha=case["alpha"] or "white"))
    header = backend.header(GOLDEN / case["file"])
    for field in ("format", "mode", "orientation", "has_alpha"):
        assert getattr(header, field) == case[field]
    assert (list(header.stored_size), list(header.size)) == (case["stored_size"], case["size"])
    global_pixels, crop_pixels = backend.views(GOLDEN / case["file"], backend.plan(header.size))
    assert global_pixels.shape == (1, 3, 728, 728) and crop_pixels.shape == (case["num_crops"], 3, 504, 504)
    exact = case["format"] != "JPEG" or SAME_JPEG_DECODER
    stored = np.load(GOLDEN / case["npz"])
    for pixels, golden, stats in (
        (global_pixels, stored["global"][None], [case["global_stats"]]),
        (crop_pixels, stored["crops"], case["crop_stats"]),
    ):
        if len(stats) == 0:
            continue
        difference = np.abs(pixels[..., ::7, ::7].numpy() - golden.astype(np.float32)).max()
        assert difference < (1.2e-3 if exact else 0.1)
        double = pixels.double().flatten(2)
        assert np.allclose(double.mean(2), [view["mean"] for view in stats], atol=1e-5 if exact else 1e-2)
        assert np.allclose(
            double.std(2, correction=0), [view["std"] for view in stats], atol=1e-5 if exact else 1e-2
        )


def test_a_rank_computes_only_its_own_views():
    rgb = noise(1100, 800)
    plan = plan_crops(*rgb.size)
    global_pixels, crop_pixels = make_views(rgb, plan)
    none, some = make_views(rgb, plan, crops=[3, 1], with_global=False)
    assert none.shape == (0, 3, 728, 728)
    assert torch.equal(some, crop_pixels[[3, 1]])
    only_global, no_crops = make_views(rgb, plan, crops=[])
    assert torch.equal(only_global, global_pixels) and no_crops.shape == (0, 3, 504, 504)


def test_crops_beyond_the_canvas_are_black():
    _, crops = make_views(noise(1000, 300), plan_crops(1000, 300), with_global=False)
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    assert torch.allclose(black, torch.tensor([-1.7923, -1.7521, -1.4802]), atol=1e-4)
    assert torch.allclose(crops[:, :, 300:], black[None, :, None, None].expand(2, 3, 204, 504), atol=1e-6)
    assert crops[:, :, :300].std() > 0.5


def test_tiny_model_sizes():
    rule = CropRule.for_model(112, 56)
    plan = plan_crops(200, 150, rule)
    global_pixels, crop_pixels = make_views(noise(200, 150), plan, rule)
    assert global_pixels.shape == (1, 3, 112, 112)
    assert crop_pixels.shape == (plan.num_crops, 3, 56, 56) and plan.num_crops > 0


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "PNG after the pixels", "PNG XMP", "WEBP", "TIFF"])
def test_images_are_turned_upright(kind, orientation):
    stored = np.asarray(noise(20, 10))
    image = Image.fromarray(stored)
    tags = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    if kind == "PNG after the pixels":
        data = encoded(image, "PNG")
        data = data[:-12] + chunk(b"eXIf", tags) + data[-12:]
    elif kind == "PNG XMP":
        data = encoded(image, "PNG")
        xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="%d"/>' % orientation
        data = data[:33] + chunk(b"iTXt", xmp) + data[33:]
    elif kind == "TIFF":
        data = encoded(image, "TIFF", tiffinfo={0x0112: orientation})
    else:
        data = encoded(image, kind, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    turned = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: stored[::-1].swapaxes(0, 1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: stored[:, ::-1].swapaxes(0, 1),
    }
    header, rgb = read_header(data), load_rgb(data)
    assert np.array_equal(np.asarray(rgb), turned.get(orientation, stored))
    assert rgb.size == header.size
    assert header.stored_size == (20, 10)
    assert header.orientation == (orientation if 1 <= orientation <= 8 else 1)


def test_orientation_can_be_left_alone():
    data = encoded(noise(20, 10), "JPEG", exif=exif(6))
    rule = DecodeRule(apply_exif=False)
    assert read_header(data, rule).size == load_rgb(data, rule).size == (20, 10)


def test_unreadable_exif_counts_as_upright():
    data = (
        encoded(noise(20, 10), "JPEG", exif=exif(6))
        .replace(b"Exif\0\0MM", b"Exif\0\0XX")
        .replace(b"Exif\0\0II", b"Exif\0\0XX")
    )
    assert read_header(data).size == (20, 10)


def test_alpha_is_laid_over_white_or_dropped():
    half_red = (255, 0, 0, 128)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    grey = Image.new("LA", (4, 4), (100, 0))
    for image, options, white, drop in (
        (Image.new("RGBA", (4, 4), half_red), {}, (255, 127, 127), (255, 0, 0)),
        (palette, {"transparency": 1}, (255, 255, 255), (10, 20, 30)),
        (palette, {"transparency": bytes([255, 0])}, (255, 255, 255), (10, 20, 30)),
        (grey, {}, (255, 255, 255), (100, 100, 100)),
        (Image.new("L", (4, 4), 7), {"transparency": 7}, (255, 255, 255), (7, 7, 7)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), {"transparency": (1, 2, 3)}, (255, 255, 255), (1, 2, 3)),
    ):
        data = encoded(image, "PNG", **options)
        assert read_header(data).has_alpha
        assert load_rgb(data, DecodeRule(alpha="white")).getpixel((1, 1)) == white
        assert load_rgb(data, DecodeRule(alpha="drop")).getpixel((1, 1)) == drop


GREY_16 = png(4, 4, 16, 0, b"\x00\x40" * 4)


@pytest.mark.parametrize(
    "data, pixel",
    [
        (png(4, 4, 16, 2, b"\x40\x00\x80\x00\xff\x00" * 4), (64, 128, 255)),
        (png(4, 4, 2, 0, b"\x1b"), (0, 0, 0)),
        (encoded(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encoded(Image.new("RGB", (4, 4), (9, 8, 7)), "BMP"), (9, 8, 7)),
        (encoded(Image.new("RGB", (4, 4), (9, 8, 7)), "GIF"), (9, 8, 7)),
        (encoded(Image.new("RGB", (4, 4), (9, 8, 7)), "WEBP", lossless=True), (9, 8, 7)),
        (encoded(Image.new("L", (4, 4), 50), "JPEG", progressive=True), (50, 50, 50)),
    ],
    ids=["rgb16", "grey2", "bilevel", "cmyk", "bmp", "gif", "webp", "progressive"],
)
def test_formats_and_modes(data, pixel):
    assert load_rgb(data).getpixel((0, 0)) == pixel


def test_grey_of_16_bits_is_refused_unless_clipping_is_asked_for():
    with pytest.raises(ImageRefused) as refusal:
        read_header(GREY_16)
    assert refusal.value.reason == "high_depth_grey"
    assert load_rgb(GREY_16, DecodeRule(clip_high_depth_grey=True)).getpixel((0, 0)) == (64, 64, 64)


JPEG = encoded(noise(90, 60), "JPEG")
PNG = encoded(noise(90, 60), "PNG")
BAD_FILES = {
    "empty file": (b"", "empty"),
    "text named .jpg": (b"this is not an image\n" * 50, "unsupported_format"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "unsupported_format"),
    "two bytes": (b"\xff\xd8", "unsupported_format"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated PNG": (PNG[: len(PNG) // 2], "truncated"),
    "truncated WebP": (encoded(noise(90, 60), "WEBP")[:-900], "corrupt"),
    "truncated TIFF": (encoded(noise(90, 60), "TIFF")[:200], "truncated"),
    "truncated GIF": (encoded(noise(90, 60), "GIF")[:2000], "truncated"),
    "truncated BMP": (encoded(noise(90, 60), "BMP")[:2000], "truncated"),
    "JPEG header only": (JPEG[:20], "corrupt"),
    "PNG signature only": (PNG[:8], "corrupt"),
    "damaged PNG": (PNG[:500] + bytes(200) + PNG[700:], "corrupt"),
    "60,000 x 60,000 PNG": (png(60000, 60000, 8, 2, b""), "too_many_pixels"),
    "60,000 x 60,000 BMP": (b"BM" + struct.pack("<IIIIii", 0, 0, 54, 40, 60000, -60000), "too_many_pixels"),
    "60,000 x 60,000 JPEG": (
        JPEG.replace(struct.pack(">HH", 60, 90), struct.pack(">HH", 60000, 60000)),
        "too_many_pixels",
    ),
    "0 x 5 PNG": (png(0, 5, 8, 2, b""), "zero_size"),
    "animated GIF": (encoded(noise(9, 9), "GIF", save_all=True, append_images=[noise(9, 9, 1)]), "animated"),
    "animated PNG": (encoded(noise(9, 9), "PNG", save_all=True, append_images=[noise(9, 9)]), "animated"),
    "animated WebP": (
        encoded(noise(9, 9), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
        "animated",
    ),
    "pages of TIFF": (encoded(noise(9, 9), "TIFF", save_all=True, append_images=[noise(9, 9)]), "animated"),
    "unsupported format": (encoded(noise(9, 9), "PPM"), "unsupported_format"),
    "16-bit grey": (GREY_16, "high_depth_grey"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_a_reason(name, tmp_path):
    data, reason = BAD_FILES[name]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        with pytest.raises(ImageRefused) as refusal:
            load_rgb(source)
        assert (refusal.value.reason, bool(refusal.value.detail)) == (reason, True), refusal.value
        assert reason in REASONS


def test_two_pictures_in_one_jpeg_are_the_first():
    first, second = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 200))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert read_header(data).format == "MPO"
    assert load_rgb(data).getpixel((8, 8))[0] > 150


def test_padding_may_not_exceed_the_pixel_limit():
    with pytest.raises(ImageRefused, match="padded to 60000x60000"):
        PillowBackend().plan((1, 60000))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_every_cut_of_a_file_is_refused_or_whole():
    """Never a crash, never pixels that the file does not hold."""
    whole = {
        name: (data, load_rgb(data).tobytes())
        for name, data in (
            ("jpeg", encoded(noise(24, 16), "JPEG")),
            ("png", encoded(noise(24, 16), "PNG")),
            ("webp", encoded(noise(24, 16), "WEBP")),
            ("gif", encoded(noise(24, 16), "GIF")),
            ("bmp", encoded(noise(24, 16), "BMP")),
            ("tiff", encoded(noise(24, 16), "TIFF")),
        )
    }
    for name, (data, pixels) in whole.items():
        for length in range(0, len(data), 7):
            try:
                assert load_rgb(data[:length]).tobytes() == pixels, (name, length)
            except ImageRefused as refusal:
                assert refusal.reason in REASONS


def test_pillows_global_limit_is_neither_used_nor_changed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert load_rgb(PNG).size == (90, 60)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(ImageRefused, match="the limit is 5000"):
        load_rgb(PNG, DecodeRule(max_pixels=5000))


def test_filling_truncated_images_is_not_tolerated(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES"):
        load_rgb(JPEG)


def test_plan_of_another_size_is_refused():
    with pytest.raises(DataError, match="its plan was made for"):
        make_views(noise(30, 20), plan_crops(20, 30))
    with pytest.raises(ImageRefused, match="when its views were planned"):  # the file was replaced meanwhile
        PillowBackend().views(encoded(noise(30, 20), "PNG"), plan_crops(20, 30))


@pytest.fixture
def data_root(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.png").write_bytes(PNG)
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to(root / "sub" / "a.png")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize(
    "path, reason",
    [
        ("http://example.com/a.png", "remote"),
        ("HTTPS://example.com/a.png", "remote"),
        ("ftp://example.com/a.png", "remote"),
        ("s3://bucket/a.png", "remote"),
        ("file:///etc/passwd", "remote"),
        ("data:image/png;base64,AAAA", "remote"),
        ("../secret.png", "outside_root"),
        ("sub/../../secret.png", "outside_root"),
        ("../root2/a.png", "outside_root"),
        ("/etc/passwd", "outside_root"),
        ("out.png", "outside_root"),
        ("missing.png", "missing"),
        ("sub/a.png/b.png", "missing"),
        ("", "bad_path"),
        ("a\0.png", "bad_path"),
        ("x" * 5000, "bad_path"),
        ("loop", "bad_path"),
    ],
)
def test_paths_stay_under_the_data_root(data_root, path, reason):
    with pytest.raises(ImageRefused) as refusal:
        resolve_under(data_root, path)
    assert refusal.value.reason == reason
    assert len(refusal.value.detail) < 1000


def test_paths_inside_the_data_root_are_resolved(data_root):
    real = (data_root / "sub" / "a.png").resolve()
    for path in ("sub/a.png", "./sub/../sub/a.png", "in.png", str(data_root / "sub" / "a.png")):
        assert resolve_under(data_root, path) == real


def test_what_is_no_file_is_refused(data_root, monkeypatch):
    for name, reason in (("sub", "not_a_file"), ("pipe.png", "not_a_file"), ("nothing.png", "missing")):
        with pytest.raises(ImageRefused) as refusal:
            load_rgb(data_root / name)
        assert refusal.value.reason == reason

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # as root, no permission bit would deny anything
    with pytest.raises(ImageRefused) as refusal:
        load_rgb(data_root / "sub" / "a.png")
    assert refusal.value.reason == "unreadable"
