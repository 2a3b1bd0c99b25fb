"""Opening an image file without trusting it: paths, file kinds, formats and declared sizes.

Whatever is wrong with an image becomes an `ImageRefused` with one of the codes of `REASONS`, so that it can
be counted and listed. Nothing in this module decodes pixels.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from megatron_vl.data.sources.locator import FileSlice
from megatron_vl.errors import ImageRefused

ImageSource = str | os.PathLike | bytes | FileSlice

REASONS = {
    "remote": "a URL; only local files are read",
    "outside_root": "the path leaves the data root",
    "bad_path": "not a usable path",
    "missing": "no such file",
    "not_a_file": "a folder, pipe or device",
    "unreadable": "the file system refuses to read it",
    "empty": "a file of 0 bytes",
    "unsupported_format": "not JPEG, PNG, WebP, BMP, TIFF or GIF, whatever its name says",
    "unsupported_mode": "a colour mode that cannot be turned into RGB",
    "zero_size": "an image of zero width or height",
    "too_many_pixels": "more pixels than the limit, declared or after padding",
    "animated": "several frames or pages",
    "high_depth_grey": "grey of more than 8 bits, which the reference clips to white",
    "truncated": "the file ends before its pixels do",
    "corrupt": "damaged content",
    "too_thin": "nothing is left of the shorter side at the largest size kept",
    "aspect_ratio": "longer than the aspect limit",
    "too_many_crops": "more crops than the limit",
}

_SCHEME = re.compile(r"(?:[a-z][a-z0-9+.-]*://|data:|file:)", re.IGNORECASE)

# The plugins are called directly, not through Image.open: that one trusts any of Pillow's forty formats and
# compares sizes with the process-wide Image.MAX_IMAGE_PIXELS, which belongs to the user.
_FORMATS: tuple[tuple[re.Pattern[bytes], Callable[..., ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.jpeg_factory),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), TiffImagePlugin.TiffImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
)


def resolve_under(root: str | os.PathLike, path: str) -> Path:
    """The real path of the image file `path`, which must lie under `root`.

    path: relative to `root`, or absolute. Links are followed before the comparison, so a link inside the root
    that points out of it is refused; a root that is itself a link is fine.
    Errors: `ImageRefused` `remote`, `bad_path`, `missing`, `outside_root`, `unreadable`.
    """
    if _SCHEME.match(path):
        raise ImageRefused("remote", f"{_shown(path)} is a URL; download it and give its path")
    if not path.strip() or "\0" in path:
        raise ImageRefused("bad_path", f"{_shown(path)} is not a path")
    real_root = Path(root).resolve()
    try:
        real = (real_root / path).resolve()
        inside = real.is_relative_to(real_root)
        exists = inside and real.exists()
    except PermissionError as error:
        raise ImageRefused("unreadable", f"{_shown(path)}: {error.strerror}") from error
    except (OSError, RuntimeError, ValueError) as error:  # name too long, loop of links, not encodable
        why = getattr(error, "strerror", None) or "it cannot be followed"  # str(error) repeats the path
        raise ImageRefused("bad_path", f"{_shown(path)}: {why}") from error
    if not inside:
        raise ImageRefused("outside_root", f"{_shown(path)} lies outside the data root {real_root}")
    if not exists:
        raise ImageRefused("missing", f"there is no {_shown(path)} under {real_root}")
    return real


def open_source(source: ImageSource) -> BinaryIO:
    """A seekable binary file on a regular, non-empty file or on the bytes of one. The caller closes it.

    Errors: `ImageRefused` `missing`, `not_a_file`, `unreadable`, `bad_path`, `empty`.
    """
    if isinstance(source, FileSlice):
        return source.open()
    if isinstance(source, bytes):
        if not source:
            raise ImageRefused("empty", "0 bytes")
        return io.BytesIO(source)
    name = _shown(os.fspath(source))
    try:
        status = os.stat(source)  # before opening: opening a pipe would wait for its writer
        if not stat.S_ISREG(status.st_mode):
            raise ImageRefused("not_a_file", f"{name} is not a regular file")
        if status.st_size == 0:
            raise ImageRefused("empty", f"{name} has 0 bytes")
        return open(source, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageRefused("missing", f"there is no file {name}") from error
    except OSError as error:
        raise ImageRefused("unreadable", f"{name}: {error.strerror or error}") from error
    except ValueError as error:
        raise ImageRefused("bad_path", f"{name}: {error}") from error


def open_image(file: BinaryIO, max_pixels: int) -> ImageFile:
    """Pillow's lazy image on `file`: header read, pixels not.

    Errors: `ImageRefused` `unsupported_format`, `zero_size`, `too_many_pixels`, `animated`, `corrupt`,
    `unreadable`.
    """
    prefix = file.read(32)
    file.seek(0)
    opener = next((opener for magic, opener in _FORMATS if magic.match(prefix)), None)
    if opener is None:
        raise ImageRefused(
            "unsupported_format", f"no JPEG, PNG, WebP, BMP, TIFF or GIF: it begins with {prefix[:12]!r}"
        )
    _check_size(_declared_size(prefix), max_pixels)
    try:
        image = opener(file, "")
        # Phones store a second picture behind the JPEG (MPO); the first one is the photo that every reader
        # shows.
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception as error:  # format parsers meet damaged bytes with any type of error
        raise damaged(error) from error
    _check_size(image.size, max_pixels)
    if animated:
        raise ImageRefused(
            "animated", f"{image.format} of several frames or pages; which one is meant is not said"
        )
    return image


def damaged(error: Exception) -> ImageRefused:
    """The refusal that an error of a format parser or decoder stands for."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno is not None:
        return ImageRefused("unreadable", text)
    cut_off = isinstance(error, EOFError) or "truncated" in text.lower()
    return ImageRefused("truncated" if cut_off else "corrupt", text)


def _declared_size(prefix: bytes) -> tuple[int, int] | None:
    """Size in the first 32 bytes of a PNG or BMP: Pillow reports a zero there only as an unknown file."""
    if prefix.startswith(b"\x89PNG") and prefix[12:16] == b"IHDR" and len(prefix) >= 24:
        return struct.unpack(">II", prefix[16:24])
    if prefix.startswith(b"BM") and len(prefix) >= 26 and prefix[14] >= 40:
        width, height = struct.unpack("<ii", prefix[18:26])
        return width, abs(height)  # negative height: rows stored top down
    return None


def _check_size(size: tuple[int, int] | None, max_pixels: int) -> None:
    if size is None:
        return
    width, height = size
    if width < 1 or height < 1:
        raise ImageRefused("zero_size", f"the image is {width}x{height} pixels")
    if width * height > max_pixels:
        raise ImageRefused(
            "too_many_pixels", f"{width}x{height} has {width * height} pixels, the limit is {max_pixels}"
        )


def _shown(path: object) -> str:
    """A path as it may stand in a log line: quoted, escaped, not endless (data: URLs carry whole images)."""
    text = repr(path)
    return text if len(text) <= 200 else text[:160] + "...'"
