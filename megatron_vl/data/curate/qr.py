"""QR codes in images, by OpenCV, which is an optional dependency."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from megatron_vl.data.curate.reasons import Finding
from megatron_vl.data.curate.rules import QrCodes
from megatron_vl.errors import ConfigError

INSTALL = "pip install 'megatron-vl[curate]' (or opencv-python-headless), or set qr_codes.enabled: false"


def opencv() -> ModuleType:
    """The module cv2, held to one thread. ConfigError when it is not installed or does not load."""
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            f"qr_codes.enabled = true: OpenCV cannot be imported ({error}); {INSTALL}"
        ) from error
    cv2.setNumThreads(1)
    return cv2


def find_qr_code(rgb: Image.Image, rule: QrCodes) -> Finding | None:
    """qr_code, or None. A code that can be read is reported with the length of its content, never followed.

    rgb: 8-bit RGB; larger ones than `rule.max_side` are searched at that size. White is laid around it,
    because the detector wants a margin that cropped codes do not have.
    """
    grey = rgb.convert("L")
    if max(grey.size) > rule.max_side:
        grey.thumbnail((rule.max_side, rule.max_side), Resampling.BILINEAR)
    pixels = np.pad(np.asarray(grey), 16, constant_values=255)
    cv2 = opencv()
    try:
        found, contents, corners, _ = _detector().detectAndDecodeMulti(pixels)
    except cv2.error as error:  # its geometry fails on some patterns that are no codes
        return None if rule.must_decode else Finding("qr_code", f"the detector gave up: {error}")
    readable = [content for content in contents if content] if found else []
    if readable:
        return Finding("qr_code", f"{len(readable)} code(s), the first with {len(readable[0])} characters")
    if found and not rule.must_decode:
        return Finding("qr_code", f"{len(corners)} place(s) that look like a code and cannot be read")
    return None


@cache
def _detector() -> object:
    return opencv().QRCodeDetector()
