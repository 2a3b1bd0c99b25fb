"""A 64-bit hash of what an image looks like: pictures that differ by scale or compression get close hashes.

The image is shrunk to 32x32 grey levels, and the 64 lowest frequencies of its cosine transform, without the
mean, are compared with their median. The idea is known as pHash (Zauner 2010); this is our own code.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from PIL.Image import Resampling

SIDE = 32
BITS = 64
# Grey levels (standard deviation at 32x32) below which the bits would be noise.
MIN_CONTRAST = 2.0
# Coefficients are rounded to this, so that the last bits of floating point never decide.
_STEP = 1 / 64


def perceptual_hash(rgb: Image.Image) -> int | None:
    """64 bits, or None for an image that is too flat to be told from others. rgb: 8-bit RGB or grey."""
    # Shrinking in two steps costs a tenth for large photos, and changes no bit of most of them.
    small = rgb.resize((SIDE, SIDE), Resampling.BILINEAR, reducing_gap=3.0).convert("L")
    grey = np.asarray(small, dtype=np.float64)
    if grey.std() < MIN_CONTRAST:
        return None
    frequencies = _COSINES @ grey @ _COSINES.T
    values = np.rint(frequencies[_LOWEST] / _STEP)
    bits = values > np.median(values)
    return int(np.packbits(bits).view(">u8")[0])


def distances(hashes: np.ndarray, value: int) -> np.ndarray:
    """Bits in which each of the hashes (uint64 [n]) differs from `value`: uint8 [n]."""
    return np.bitwise_count(hashes ^ np.uint64(value))


def _cosine_table() -> np.ndarray:
    """The orthonormal DCT-II of length SIDE as a matrix [SIDE, SIDE]."""
    position, frequency = np.arange(SIDE) + 0.5, np.arange(SIDE)[:, None]
    table = np.cos(np.pi * frequency * position / SIDE) * np.sqrt(2 / SIDE)
    table[0] /= np.sqrt(2)
    return table


def _lowest_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the 64 lowest frequencies after the mean, by their sum, then by row."""
    order = sorted((row + column, row, column) for row in range(SIDE) for column in range(SIDE))
    chosen = np.array([(row, column) for _, row, column in order[1 : BITS + 1]])
    return chosen[:, 0], chosen[:, 1]


_COSINES = _cosine_table()
_LOWEST = _lowest_frequencies()
