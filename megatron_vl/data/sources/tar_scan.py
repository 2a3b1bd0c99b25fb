"""The index of one WebDataset shard: which members make up which sample, and where their bytes are.

A sample is the run of members with one key: the name up to the first dot of its last part, so `a/7.0.jpg`,
`a/7.1.png` and `a/7.json` are the sample `a/7`. One damaged member refuses its sample; the others stay.

Arrays per sample: `json` and `txt` (offset, length pairs, -1 = none), `first_image` (n + 1), `line` (number of
the sample in the shard, refused ones counted), `key_end`; per image: `image` (offset, length pairs),
`extension_end`; and the keys and extensions as UTF-8 in one piece, `names` and `extensions`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.sources.index_file import Scan
from megatron_vl.data.sources.tar_headers import Member, Refusal, members
from megatron_vl.errors import DataError

TAR_KIND = "tar-1"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NUMBERS = re.compile(r"\d{1,12}")


@dataclass
class _Group:
    """The members of one key that lie together."""

    key: str
    line: int
    members: dict[str, Member] = field(default_factory=dict)
    problem: Refusal | None = None

    @property
    def looks_whole(self) -> bool:
        """Whether it has a text and an image. (A record that lacks a second image is refused when read.)"""
        return any(name in self.members for name in ("json", "txt")) and any(map(is_image, self.members))

    def refuse(self, refusal: Refusal) -> None:
        """Keeps the first problem: one sample is counted once."""
        self.problem = self.problem or refusal


def scan_tar(path: str) -> Scan:
    """Index of one shard. Raises DataError for a file that is empty, compressed, or without any good sample."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = os.pread(file.fileno(), 8, 0)
        packed = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
        if packed:
            raise DataError(f"{path}: compressed with {packed}; unpack it, since samples are read by offset")
        if not size:
            raise DataError(f"{path}: 0 bytes; a shard needs at least one sample")
        writer = _Writer(path)
        for group in _groups(members(file.fileno(), size)):
            writer.add(group)
    scan = writer.finish()
    if not scan.samples:
        found = ", ".join(f"{reason} {count}" for reason, count in scan.counts.most_common()) or "no member"
        raise DataError(
            f"{path}: no sample in this shard ({found}); is it a tar archive? remove or repair it"
        )
    return scan


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member name; the extension begins at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def is_image(extension: str) -> bool:
    """`jpg`, or `0.jpg`, `left.jpg` for one of several."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def image_order(extension: str) -> tuple:
    """Sorting key of the images of a sample: `jpg` first, then by number (2 before 10), then by name."""
    stem = extension.rpartition(".")[0]
    numbers = [int(digits) for digits in _NUMBERS.findall(stem)]
    return (stem != "", not numbers, numbers, extension)


def _groups(found: Iterator[Member | Refusal]) -> Iterator[_Group]:
    """Members collected to samples. What belongs to no sample comes as a group with an empty key."""
    line, group = 0, None
    for one in found:
        key = split_name(one.name)[0] if one.name is not None else None
        if key is None or group is None or key != group.key:
            if group is not None:
                if key is None and one.reason != "after_end" and not group.looks_whole:
                    # What is lost here is likely to be of this sample: it is counted once, for both.
                    group.refuse(one)
                    yield group
                    group = None
                    continue
                yield group
            line += 1
            group = _Group(key or "", line)
        if isinstance(one, Refusal):
            group.refuse(one)
            continue
        extension = split_name(one.name)[1]
        if extension in group.members:
            group.refuse(Refusal(one.name, one.offset, "duplicate_member", f"{one.name!r} comes twice"))
        group.members[extension] = one
    if group is not None:
        yield group


@dataclass
class _Writer:
    """Collects the arrays of a shard."""

    path: str
    scan: Scan = field(default_factory=lambda: Scan(0, {}))
    _keys: set[str] = field(default_factory=set)
    _rows: dict[str, list[int]] = field(
        default_factory=lambda: {
            name: [] for name in ("json", "txt", "line", "key_end", "first_image", "image", "extension_end")
        }
    )
    _names: bytearray = field(default_factory=bytearray)
    _extensions: bytearray = field(default_factory=bytearray)

    def add(self, group: _Group) -> None:
        """Takes a sample into the arrays, or its refusal into the counts."""
        images = sorted((name for name in group.members if is_image(name)), key=image_order)
        texts = [name for name in ("json", "txt") if name in group.members]
        if group.problem is None:
            group.problem = self._problem(group, texts)
        if group.problem is not None:
            problem = group.problem
            name = f"{os.path.basename(self.path)}:{group.key or group.line}"
            self.scan.refuse(BadSample(name, self.path, group.line, problem.reason, problem.detail))
            return
        for name in group.members:
            if name not in texts and not is_image(name):
                self.scan.ignored[f".{name}"] += 1
        self._keys.add(group.key)
        rows = self._rows
        for name in ("json", "txt"):
            member = group.members.get(name)
            rows[name] += [member.offset, member.length] if member else [-1, -1]
        rows["line"].append(group.line)
        rows["first_image"].append(len(rows["extension_end"]))
        for name in images:
            rows["image"] += [group.members[name].offset, group.members[name].length]
            self._extensions += name.encode()
            rows["extension_end"].append(len(self._extensions))
        self._names += group.key.encode()
        rows["key_end"].append(len(self._names))
        self.scan.samples += 1

    def finish(self) -> Scan:
        """The scan with its arrays."""
        self._rows["first_image"].append(len(self._rows["extension_end"]))
        arrays = {name: np.array(values, dtype=np.int64) for name, values in self._rows.items()}
        arrays["names"] = np.frombuffer(bytes(self._names), dtype=np.uint8)
        arrays["extensions"] = np.frombuffer(bytes(self._extensions), dtype=np.uint8)
        self.scan.arrays = arrays
        return self.scan

    def _problem(self, group: _Group, texts: list[str]) -> Refusal | None:
        if group.key in self._keys:
            detail = f"{group.key!r} came before; the members of a sample must lie together"
            return Refusal(None, 0, "duplicate_key", detail)
        if not texts:
            held = ", ".join(f".{name}" for name in sorted(group.members)[:8]) or "nothing"
            return Refusal(None, 0, "no_text", f"{group.key!r} has {held}")
        return None
