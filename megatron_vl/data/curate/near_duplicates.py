"""Which samples show images that other samples show: all close pairs of hashes, then one pass over samples.

Pairs are found by bands: hashes that differ in at most r bits are equal in at least one of r + 1 bands of
bits, so only hashes that share a band are compared. The result is complete, not approximate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vl.data.curate.perceptual_hash import BITS

_BLOCK = 1 << 20  # comparisons at a time


@dataclass(frozen=True)
class Duplicate:
    """sample is dropped because its images are near those of `survivor`; distance: bits, of the worst image."""

    sample: int
    survivor: int
    distance: int


def close_pairs(hashes: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs i < j of distinct hashes (uint64 [n]) that differ in at most `radius` bits, sorted: int64 each."""
    found: list[np.ndarray] = []
    for shift, width in _bands(radius + 1):
        band = (hashes >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        order = np.argsort(band, kind="stable")
        for left, right in _same_band(band[order]):
            first, second = order[left], order[right]
            near = np.bitwise_count(hashes[first] ^ hashes[second]) <= radius
            pair = np.stack([first[near], second[near]])
            found.append(np.sort(pair, axis=0))
    if not found:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    pairs = np.unique(np.concatenate(found, axis=1), axis=1)
    return pairs[0], pairs[1]


def choose_survivors(
    samples: np.ndarray, hashes: np.ndarray, order: np.ndarray, radius: int, min_share: float
) -> list[Duplicate]:
    """Who is dropped.

    samples: int64 [m], the sample that each image belongs to. hashes: uint64 [m]. order: the samples, the
    most wanted first. Samples are taken in that order; one is dropped when at least `min_share` of its images
    are within `radius` of images of samples that were kept before. So every dropped sample has a kept
    neighbour, and chains of small differences do not drop what is far from every survivor.
    """
    unique, image_hash = np.unique(hashes, return_inverse=True)
    neighbours = _neighbours(*close_pairs(unique, radius))
    images_of: dict[int, list[int]] = {}
    for sample, number in zip(samples.tolist(), image_hash.tolist()):
        images_of.setdefault(sample, []).append(number)
    owner = np.full(len(unique), -1, dtype=np.int64)
    dropped = []
    for sample in order.tolist():
        images = images_of.get(sample, [])
        seen = [hit for image in images if (hit := _nearest_owner(image, unique, neighbours, owner))]
        if images and len(seen) >= min_share * len(images):
            dropped.append(Duplicate(sample, seen[0][1], max(distance for distance, _ in seen)))
            continue
        for image in images:
            if owner[image] < 0:
                owner[image] = sample
    return dropped


def _nearest_owner(
    image: int, unique: np.ndarray, neighbours: dict[int, list[int]], owner: np.ndarray
) -> tuple[int, int] | None:
    """(distance, sample) of the nearest image that a kept sample shows; the lowest sample among equals."""
    if owner[image] >= 0:
        return 0, int(owner[image])
    hits = [
        (int(np.bitwise_count(unique[image] ^ unique[other])), int(owner[other]))
        for other in neighbours.get(image, ())
        if owner[other] >= 0
    ]
    return min(hits, default=None)


def _neighbours(first: np.ndarray, second: np.ndarray) -> dict[int, list[int]]:
    table: dict[int, list[int]] = {}
    for left, right in zip(first.tolist(), second.tolist()):
        table.setdefault(left, []).append(right)
        table.setdefault(right, []).append(left)
    return table


def _bands(count: int) -> list[tuple[int, int]]:
    """`count` stretches of bits that cover all 64: (lowest bit, width)."""
    edges = [BITS * number // count for number in range(count + 1)]
    return [(low, high - low) for low, high in zip(edges, edges[1:])]


def _same_band(band: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (left < right) of all pairs with equal values in a sorted array, in blocks.

    Neighbours at distance 1, 2, 3, ... are compared at once for all values; only values that occur more often
    than the distance stay.
    """
    left = np.arange(len(band) - 1) if len(band) > 1 else np.empty(0, dtype=np.int64)
    distance = 1
    while len(left):
        left = left[left + distance < len(band)]
        left = left[band[left] == band[left + distance]]
        for start in range(0, len(left), _BLOCK):
            yield left[start : start + _BLOCK], left[start : start + _BLOCK] + distance
        distance += 1
