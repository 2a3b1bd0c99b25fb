"""The headers of a tar archive, read without unpacking anything and without trusting anything.

Why not tarfile: at a damaged header it takes the archive for finished and says nothing, so that all samples
behind would be missing unnoticed; and it takes nearly twice the time. Read here are ustar, GNU long names and
the `path` and `size` of PAX headers, which is what tar, Python and WebDataset write.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
_LARGEST_EXTENSION = 1 << 20  # bytes of a long name or PAX header
_CHUNK = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
_WHAT_IT_IS = {
    b"1": "link",
    b"2": "link",
    b"3": "special_member",
    b"4": "special_member",
    b"6": "special_member",
    b"S": "sparse_member",
}


@dataclass(frozen=True)
class Member:
    """One regular member. name: as stored, checked. offset, length: its bytes in the archive."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class Refusal:
    """Something in the archive that cannot be used. name: of the member, None when it is not known."""

    name: str | None
    offset: int
    reason: str
    detail: str


@dataclass
class _Extended:
    """What the headers before a member say about it."""

    name: bytes | None = None
    size: int | None = None
    problem: tuple[str, str] | None = None  # (reason, detail)


def members(descriptor: int, size: int) -> Iterator[Member | Refusal]:
    """Everything in an open archive of `size` bytes, in order; folders are passed over.

    After damage the scan goes on at the next block that is a good header. The last thing is a Refusal
    `truncated_member` without a name when the archive has no end mark.
    """
    position, extended = 0, _Extended()
    while True:
        block = os.pread(descriptor, BLOCK, position)
        if len(block) < BLOCK:
            yield Refusal(None, position, "truncated_member", "the archive ends without its end mark")
            return
        if not any(block):
            yield from _behind_the_end(descriptor, position + BLOCK, size)
            return
        length = _size_field(block)
        if length is None or not _checksum_fits(block):
            found = _next_header(descriptor, position + BLOCK, size)
            yield Refusal(
                None, position, "bad_header", f"damaged at byte {position}, {found - position} bytes are lost"
            )
            position, extended = found, _Extended()
            continue
        kind, body = block[156:157], position + BLOCK
        if kind in (b"L", b"x", b"K", b"g"):
            _extend(extended, kind, descriptor, body, length, size)
        else:
            if extended.size is not None and kind in _REGULAR:
                length = extended.size
            one = _member(block, kind, extended, body, length, size)
            if one is not None:
                yield one
            if isinstance(one, Refusal) and one.reason == "truncated_member":
                return
            extended = _Extended()
            if kind not in (*_REGULAR, b"S"):
                length = 0  # the size of a link or device is not that of a body
        position = body + -(-length // BLOCK) * BLOCK


def _member(
    block: bytes, kind: bytes, extended: _Extended, body: int, length: int, size: int
) -> Member | Refusal | None:
    raw = extended.name
    if raw is None:
        raw = block[:100].split(b"\0", 1)[0]
        prefix = block[345:500].split(b"\0", 1)[0]
        # only POSIX ustar has a prefix there; GNU keeps times in it
        if prefix and block[257:263] == b"ustar\0":
            raw = prefix + b"/" + raw
    shown = raw[:200].decode("utf-8", "replace")
    if kind == b"5" or (kind in _REGULAR and raw.endswith(b"/")):
        return None
    problem = _name_problem(raw)
    if problem is not None:
        return Refusal(shown, body - BLOCK, "bad_member_name", f"{shown!r} {problem}")
    if extended.problem is not None:
        return Refusal(shown, body - BLOCK, *extended.problem)
    name = raw.decode("utf-8").removeprefix("./")
    if kind not in _REGULAR:
        reason = _WHAT_IT_IS.get(kind, "special_member")
        return Refusal(name, body - BLOCK, reason, f"{shown!r} is of tar type {kind!r}")
    if body + length > size:
        return Refusal(
            name,
            body - BLOCK,
            "truncated_member",
            f"{shown!r} has {length} bytes, {max(0, size - body)} are there",
        )
    return Member(name, body, length)


def _name_problem(raw: bytes) -> str | None:
    """Why a member must not be called so: names that would leave the folder when somebody unpacks them."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8"
    if not name or name.startswith("/") or "\\" in name or any(ord(letter) < 32 for letter in name):
        return "is empty, absolute, or holds a backslash or control character"
    return "has a part .." if ".." in name.split("/") else None


def _extend(extended: _Extended, kind: bytes, descriptor: int, body: int, length: int, size: int) -> None:
    """Takes over what a long name or PAX header says, or that it cannot be read. K and g are of no use here."""
    if kind in (b"K", b"g"):
        return
    if length > _LARGEST_EXTENSION or body + length > size:
        extended.problem = ("bad_header", f"it has an extended header of {length} bytes")
        return
    data = os.pread(descriptor, length, body)
    if kind == b"L":
        extended.name = data.split(b"\0", 1)[0]
        return
    while data:
        digits, _, rest = data.partition(b" ")
        count = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = data[len(digits) + 1 : count].removesuffix(b"\n").partition(b"=")
        if not rest or count <= len(digits) or count > len(data) or not equals:
            extended.problem = ("bad_header", "its PAX header cannot be read")
            return
        if key == b"path":
            extended.name = value
        elif key == b"size" and value.isdigit() and len(value) <= 18:
            extended.size = int(value)
        elif key == b"size":
            extended.problem = ("bad_header", f"its PAX header has the size {value[:20]!r}")
        elif key.startswith(b"GNU.sparse"):
            extended.problem = ("sparse_member", "it is a sparse file in PAX form")
        data = data[count:]


def _size_field(block: bytes) -> int | None:
    """The size in a header: octal, or base 256 when its first bit is set. None = neither."""
    field = block[124:136]
    if field[0] & 0x80:
        value = int.from_bytes(field[1:], "big")
        return value if field[0] == 0x80 and value < 1 << 62 else None
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def _checksum_fits(block: bytes) -> bool:
    """Sum of the bytes of the header with its own field as spaces, as unsigned bytes or, of old, as signed."""
    digits = block[148:156].strip(b" \0")
    try:
        stored = int(digits, 8)
    except ValueError:
        return False
    rest = block[:148] + block[156:]
    total = sum(rest) + 8 * ord(" ")
    return stored == total or stored == total - 256 * sum(byte > 127 for byte in rest)


def _next_header(descriptor: int, position: int, size: int) -> int:
    """Where the next good header begins, or the size of the archive rounded down to blocks."""
    while position + BLOCK <= size:
        chunk = os.pread(descriptor, _CHUNK, position)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            block = chunk[start : start + BLOCK]
            if block[257:262] == b"ustar" and _checksum_fits(block) and _size_field(block) is not None:
                return position + start
        position += max(BLOCK, len(chunk) // BLOCK * BLOCK)
    return max(position, size)


def _behind_the_end(descriptor: int, position: int, size: int) -> Iterator[Refusal]:
    """Archives are padded with zeros; anything else there was appended and is not part of the archive."""
    while position < size:
        chunk = os.pread(descriptor, _CHUNK, position)
        if not chunk:
            return
        if chunk.count(0) != len(chunk):
            yield Refusal(
                None, position, "after_end", f"data behind the end mark, from about byte {position}"
            )
            return
        position += len(chunk)
