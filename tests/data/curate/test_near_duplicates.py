"""Perceptual hashes and the choice of survivors."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from megatron_vl.data.curate.near_duplicates import choose_survivors, close_pairs
from megatron_vl.data.curate.perceptual_hash import distances, perceptual_hash
from tests.data.curate.made import picture


def apart(first: Image.Image, second: Image.Image) -> int:
    one, other = perceptual_hash(first), perceptual_hash(second)
    assert one is not None and other is not None
    return (one ^ other).bit_count()


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


@pytest.mark.parametrize("seed", range(4))
def test_the_same_picture_in_other_files_is_near(seed):
    image = picture(seed, (800, 600))
    assert apart(image, image.copy()) == 0
    for other in (
        as_jpeg(image, 40),
        image.resize((400, 300)),
        image.resize((1213, 911)),
        ImageEnhance.Brightness(image).enhance(0.9),
        image.convert("L").convert("RGB"),
    ):
        assert apart(image, other) <= 4


def test_other_pictures_are_far():
    hashes = [perceptual_hash(picture(seed)) for seed in range(60)]
    nearest = min((a ^ b).bit_count() for number, a in enumerate(hashes) for b in hashes[:number])
    assert nearest >= 10


def test_a_changed_picture_is_a_near_miss():
    image = picture(1, (400, 300))
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    covered = image.copy()
    ImageDraw.Draw(covered).rectangle([0, 0, 200, 300], fill=(0, 0, 0))
    assert apart(image, mirrored) > 10 and apart(image, covered) > 10


def test_flat_pictures_have_no_hash():
    assert perceptual_hash(Image.new("RGB", (100, 80), (3, 200, 7))) is None
    assert perceptual_hash(Image.new("RGB", (1, 1))) is None


def test_hashes_have_half_their_bits_set():
    assert all(perceptual_hash(picture(seed)).bit_count() in (31, 32) for seed in range(10))


def flipped(value: int, *bits: int) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


@pytest.mark.parametrize("radius", [0, 1, 4, 9, 15])
def test_pairs_equal_those_of_a_full_comparison(radius):
    draw = np.random.default_rng(radius)
    base = draw.integers(0, 2**64, 60, dtype=np.uint64)
    values = list(map(int, base))
    for value in list(values):
        for count in (1, radius, radius + 1, radius + 3):
            values.append(flipped(value, *map(int, draw.choice(64, count, replace=False))))
    hashes = np.unique(np.array(values, dtype=np.uint64))
    first, second = close_pairs(hashes, radius)
    expected = {
        (i, j)
        for i in range(len(hashes))
        for j in np.flatnonzero(distances(hashes, int(hashes[i])) <= radius)
        if i < j
    }
    assert set(zip(first.tolist(), second.tolist())) == expected and len(first) == len(expected)
    assert radius == 0 or len(expected) > 50


def choose(images: dict[int, list[int]], radius=2, order=None, min_share=1.0) -> list[tuple[int, int, int]]:
    samples = np.array([sample for sample, hashes in images.items() for _ in hashes], dtype=np.int64)
    hashes = np.array([value for values in images.values() for value in values], dtype=np.uint64)
    order = np.array(order if order is not None else list(images), dtype=np.int64)
    return [
        (d.sample, d.survivor, d.distance)
        for d in choose_survivors(samples, hashes, order, radius, min_share)
    ]


A, B = 0x0123456789ABCDEF, 0xFEDCBA9876543210


def test_the_first_in_order_survives():
    images = {0: [A], 1: [flipped(A, 3)], 2: [B], 3: [A], 4: [flipped(A, 1, 2, 3)]}
    assert choose(images) == [(1, 0, 1), (3, 0, 0)]
    assert choose(images, order=[4, 3, 2, 1, 0]) == [(1, 3, 1), (0, 3, 0)]


def test_a_chain_does_not_drop_what_is_far_from_every_survivor():
    """0 - 1 - 2 in steps of 2 bits: 1 goes, 2 is 4 bits from 0 and stays."""
    assert choose({0: [A], 1: [flipped(A, 0, 1)], 2: [flipped(A, 0, 1, 2, 3)]}) == [(1, 0, 2)]


def test_samples_of_several_images():
    images = {0: [A, B], 1: [A], 2: [A, ~B & 0xF0F0], 3: []}
    assert choose(images) == [(1, 0, 0)]
    assert choose(images, min_share=0.5) == [(1, 0, 0), (2, 0, 0)]
    assert choose({0: [A, A]}) == []  # a sample is no duplicate of itself


def test_many_equal_bands_take_no_quadratic_memory():
    """100,000 hashes of which 2,000 share their upper 16 bits; 50 copies with one bit changed are found."""
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[:2000] = (hashes[:2000] & np.uint64((1 << 48) - 1)) | np.uint64(0xABCD << 48)
    copies = hashes[5000:5050] ^ np.uint64(1 << 17)
    first, _ = close_pairs(np.unique(np.concatenate([hashes, copies])), 4)
    assert len(first) == 50
