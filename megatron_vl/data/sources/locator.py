"""Images that are not files of their own: a slice of a larger file, or bytes that came with the sample.

A path that stands in the data stays a string in `ImagePart.path` and is resolved under the data root. What is
here is made by a source and never read from the data, so that no text can name a slice of another file.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass, field
from typing import BinaryIO

from megatron_vl.data.sample import ImagePart
from megatron_vl.errors import ImageRefused

LARGEST_IMAGE_BYTES = 1 << 30


@dataclass(frozen=True)
class FileSlice:
    """`length` bytes of the file `path` from byte `offset` on. Spelled `path:offset:length` in logs."""

    path: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.path}:{self.offset}:{self.length}"

    def open(self) -> BinaryIO:
        """A seekable binary file over the slice alone; the caller closes it.

        Only what is read is fetched, so that a header costs a few kilobytes of a large image. Raises
        ImageRefused `missing`, `unreadable`, `not_a_file`, `empty`, and `truncated` when the file ends before
        the slice does.
        """
        if self.length == 0:
            raise ImageRefused("empty", f"{self} has 0 bytes")
        try:
            status = os.stat(self.path)  # before opening: opening a pipe would wait for its writer
            if not stat.S_ISREG(status.st_mode):
                raise ImageRefused("not_a_file", f"{self.path} is not a regular file")
            if self.offset + self.length > status.st_size:
                raise ImageRefused(
                    "truncated", f"{self} reaches beyond the {status.st_size} bytes of its file"
                )
            return io.BufferedReader(_Window(open(self.path, "rb", buffering=0), self.offset, self.length))
        except FileNotFoundError as error:
            raise ImageRefused("missing", f"there is no file {self.path}") from error
        except OSError as error:
            raise ImageRefused("unreadable", f"{self.path}: {error.strerror or error}") from error

    def read(self) -> bytes:
        """All bytes of the slice. Errors: as `open`, and `unreadable` above LARGEST_IMAGE_BYTES."""
        if self.length > LARGEST_IMAGE_BYTES:
            raise ImageRefused(
                "unreadable", f"{self} is larger than the limit of {LARGEST_IMAGE_BYTES} bytes per image"
            )
        with self.open() as file:
            data = file.read()
        if len(data) != self.length:
            raise ImageRefused("truncated", f"{self}: only {len(data)} bytes could be read")
        return data


@dataclass(frozen=True)
class LocatedImage(ImagePart):
    """An image whose bytes the source has found. path: how it is called in logs; never opened.

    bytes_at: the place of the bytes, or the bytes themselves.
    """

    bytes_at: FileSlice | bytes = field(repr=False)


class _Window(io.RawIOBase):
    """The bytes [start, start + length) of a raw file as a file of its own, which it closes."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self._file = file
        self._start = start
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(22, "position before the start of the slice")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray) -> int:
        left = max(0, self._length - self._position)
        data = os.pread(self._file.fileno(), min(len(buffer), left), self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
