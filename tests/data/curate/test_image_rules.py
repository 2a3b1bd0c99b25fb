"""Rules about one image: a hit and a near miss each, and files that cannot be read."""

import struct
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_vl.data.curate.examine import Examiner
from megatron_vl.data.curate.image_rules import find_bad_size, find_constant_colour, judge_image
from megatron_vl.data.curate.qr import find_qr_code
from megatron_vl.data.curate.rules import AspectRatio, CurationConfig, DegenerateImages, QrCodes, Source
from megatron_vl.data.curate.settings import check
from megatron_vl.errors import ConfigError
from tests.data.curate.made import picture, write_jsonl


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((14, 14), None),
        ((13, 500), "tiny_image"),
        ((3600, 100), None),  # at the limit
        ((3601, 100), "aspect_ratio"),
        ((100, 3601), "aspect_ratio"),
        ((10000, 32), "aspect_ratio"),
    ],
)
def test_sizes(size, expected):
    found = find_bad_size(size, DegenerateImages(), AspectRatio())
    assert (found.reason if found else None) == expected
    assert find_bad_size(size, DegenerateImages(enabled=False), AspectRatio(enabled=False)) is None


def test_constant_colour():
    flat = np.full((50, 50, 3), 100, dtype=np.uint8)
    flat[3, 3] = 108
    assert find_constant_colour(Image.fromarray(flat), DegenerateImages()).reason == "constant_image"
    flat[4, 4, 1] = 99
    assert find_constant_colour(Image.fromarray(flat), DegenerateImages()) is None
    assert find_constant_colour(Image.new("RGB", (9, 9)), DegenerateImages(enabled=False)) is None


def bomb(path):
    """A PNG of some bytes that says that it is 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    picture(1).save(folder / "good.jpg", quality=90)
    whole = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"<html>404</html>")
    bomb(folder / "bomb.png")
    picture(2).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("good.jpg", None),
        ("cut.jpg", "truncated"),
        ("empty.png", "empty"),
        ("text.png", "unsupported_format"),
        ("bomb.png", "too_many_pixels"),
        ("../secret.png", "outside_root"),
        ("link.png", "outside_root"),
        ("/etc/passwd", "outside_root"),
        ("https://example.com/a.png", "remote"),
        ("data:image/png;base64,AAAA", "remote"),
        ("gone.png", "missing"),
    ],
)
def test_unreadable_images_are_failures_by_reason(root, path, reason):
    config = CurationConfig("out", [Source("s", ["f"])], data_root=str(root))
    judged = judge_image(path, config, with_hash=True)
    assert (judged.finding.reason if judged.finding else None) == reason
    assert judged.failed == (reason is not None) and (judged.hash is not None) == (reason is None)


def test_a_qr_rule_without_opencv_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    config = CurationConfig(
        "out", [Source("s", [write_jsonl(tmp_path / "f", [])])], str(tmp_path), qr_codes=QrCodes(enabled=True)
    )
    (problem,) = check(config)
    assert problem.path == "qr_codes.enabled" and "opencv-python-headless" in problem.remedy
    with pytest.raises(ConfigError, match="opencv-python-headless"):
        Examiner(config)
    assert list(check(replace(config, qr_codes=QrCodes()))) == []


def qr_code(content: str, module: int = 4) -> Image.Image:
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is optional")
    code = cv2.QRCodeEncoder.create().encode(content)
    return Image.fromarray(np.kron(code, np.ones((module, module), dtype=np.uint8))).convert("RGB")


def test_qr_codes_are_found_alone_and_in_a_picture():
    code = qr_code("https://example.com/never/opened")
    assert find_qr_code(code, QrCodes()).reason == "qr_code"
    scene = picture(3, (900, 700))
    scene.paste(code, (300, 200))
    found = find_qr_code(scene, QrCodes())
    assert found.reason == "qr_code" and "32 characters" in found.detail
    large = scene.resize((3600, 2800))
    assert find_qr_code(large, QrCodes()).reason == "qr_code"


def test_what_is_no_qr_code_is_not_found():
    code = np.array(qr_code("near miss"))
    shuffled = np.random.default_rng(0).permutation(code.reshape(-1, 3)).reshape(code.shape)
    half = Image.fromarray(code[: len(code) // 2])
    for image in (Image.fromarray(shuffled), half, *(picture(seed, (400, 300)) for seed in range(5))):
        assert find_qr_code(image, QrCodes()) is None
