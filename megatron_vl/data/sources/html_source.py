"""Folders of HTML pages as a source: one page is one sample.

A page is its own index, so nothing is stored: the folder is listed at every start, in sorted order. Bytes and
modification time of every page are kept from the listing; one that changes during a run is refused, so that
all ranks go on seeing the same samples.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vl.data.bad_samples import BadSample, SampleRefused
from megatron_vl.data.sources.files import files_below
from megatron_vl.data.sources.html_page import PageSample, decode_page, read_page
from megatron_vl.data.sources.html_rules import DEFAULT_RULE, HtmlRule
from megatron_vl.data.sources.record import Record
from megatron_vl.errors import DataError

SUFFIXES = (".html", ".htm", ".xhtml")


@dataclass(frozen=True)
class PageFile(Record):
    """One page. name: its path below the folder that was named, which is its id. problem: see `parse`."""

    name: str
    rule: HtmlRule
    problem: tuple[str, str] | None = None

    @property
    def default_id(self) -> str:
        return self.name

    def parse(self) -> PageSample:
        """The document of the page. Raises SampleRefused as `decode_page` and `read_page`, and
        page_too_large, unreadable, changed."""
        if self.problem is not None:
            raise SampleRefused(*self.problem, self.name)
        try:
            return read_page(decode_page(self.data), self.name, os.path.dirname(self.source), self.rule)
        except SampleRefused as refusal:
            raise SampleRefused(refusal.reason, refusal.detail, self.name) from refusal

    def content(self) -> bytes:
        """The page, or why it was not read."""
        return self.data if self.problem is None else self.problem[0].encode()


class HtmlSource:
    """Pages of folders, or single pages, addressed as one list; see `record.Source`.

    Image sources are made absolute through the folder of their page; `image_checks.resolve_under` decides
    whether they lie under the data root. Links are refused when they lead out of the folder that was named.
    Raises DataError for a path that is missing and for a folder without pages.
    """

    def __init__(self, paths: Sequence[str], rule: HtmlRule = DEFAULT_RULE):
        self.rule = rule
        self._folders = [os.path.abspath(path) for path in paths]
        if not self._folders:
            raise DataError("no HTML page is given; name at least one page or folder")
        self._is_page = [os.path.isfile(folder) for folder in self._folders]
        self._refused: list[BadSample] = []
        self._names: list[str] = []
        self._folder_of: list[int] = []
        identities: list[tuple[int, int]] = []
        for number, folder in enumerate(self._folders):
            before = len(self._names)
            for name in _listed(folder):
                identity = self._identity(number, name)
                if identity is not None:
                    identities.append(identity)
                    self._names.append(name)
                    self._folder_of.append(number)
            if len(self._names) == before:
                raise DataError(f"{folder}: no HTML page below; one must end in {' or '.join(SUFFIXES)}")
        self._identities = np.array(identities, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> PageFile:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        name = self._names[index]
        path = self._path(self._folder_of[index], name)
        size, mtime_ns = map(int, self._identities[index])
        if size > self.rule.max_bytes:
            problem = ("page_too_large", f"{size} bytes, the limit is {self.rule.max_bytes}")
            return PageFile(path, 1, b"", name, self.rule, problem)
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                data = file.read(size + 1)
        except OSError as error:
            return PageFile(path, 1, b"", name, self.rule, ("unreadable", f"{error.strerror or error}"))
        if (len(data), status.st_mtime_ns) != (size, mtime_ns):
            problem = ("changed", f"the page had {size} bytes when the folder was listed; leave it alone")
            return PageFile(path, 1, b"", name, self.rule, problem)
        return PageFile(path, 1, data, name, self.rule)

    def describe(self) -> list[dict[str, int | str]]:
        """Path, bytes and number of pages per folder, and a digest over the names and sizes of its pages."""
        owners, sizes = np.array(self._folder_of), self._identities[:, 0]
        described = []
        for number, folder in enumerate(self._folders):
            own = np.flatnonzero(owners == number)
            listing = "".join(f"{self._names[page]}\0{sizes[page]}\n" for page in own)
            described.append(
                {
                    "path": folder,
                    "bytes": int(sizes[own].sum()),
                    "samples": len(own),
                    "digest": hashlib.sha256(listing.encode()).hexdigest()[:16],
                }
            )
        return described

    def refused(self) -> list[BadSample]:
        """Links and things that are no files."""
        return list(self._refused)

    def refused_counts(self) -> dict[str, int]:
        """The same by reason."""
        return dict(Counter(bad.reason for bad in self._refused))

    def close(self) -> None:
        """Nothing stays open between samples."""

    def _path(self, number: int, name: str) -> str:
        folder = self._folders[number]
        return folder if self._is_page[number] else os.path.join(folder, name)

    def _identity(self, number: int, name: str) -> tuple[int, int] | None:
        """(bytes, modification time) of a page, None when it is refused for what it is."""
        path = self._path(number, name)
        try:
            os.fsencode(path).decode("utf-8")
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                home = os.path.realpath(
                    os.path.dirname(path) if self._is_page[number] else self._folders[number]
                )
                if not os.path.realpath(path).startswith(home + os.sep):
                    return self._refuse(path, name, "link", "leads out of the folder of pages")
                status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                return self._refuse(path, name, "not_a_file", "is not a regular file")
        except UnicodeDecodeError:
            return self._refuse(path, name, "bad_path", "the name of the file is not UTF-8")
        except OSError as error:
            return self._refuse(path, name, "unreadable", f"{error.strerror or error}")
        return status.st_size, status.st_mtime_ns

    def _refuse(self, path: str, name: str, reason: str, detail: str) -> None:
        name, path = (os.fsencode(text).decode("utf-8", "replace") for text in (name, path))
        self._refused.append(BadSample(name, path, 1, reason, detail))


def _listed(folder: str) -> list[str]:
    """Names of the pages below a folder, relative to it; of a single page, its own name."""
    if os.path.isdir(folder):
        return [os.path.relpath(path, folder) for path in files_below(folder, SUFFIXES)]
    if not os.path.exists(folder):
        raise DataError(f"{folder}: no such page or folder; correct the path")
    return [os.path.basename(folder)]
