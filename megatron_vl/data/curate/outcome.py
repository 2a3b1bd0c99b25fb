"""What the first pass finds out about one sample, as it is stored between the passes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields

from megatron_vl.data.bad_samples import BadSample


@dataclass
class Pair:
    """An image-text pair that may become a quarter of a mosaic.

    image: path as in the data. size: (width, height). text: with references to objects. objects: fields of
    `GroundedObject`, in pixels.
    """

    image: str
    size: list[int]
    text: str
    objects: list[dict] = field(default_factory=list)


@dataclass
class Outcome:
    """id, source, line: as in `BadSample`. reason: None for a sample that is kept so far.

    record: the sample as it is to be written, None = its line as it stands. removed: [path, reason, detail] of
    images cut out of a document. images: number in the data. failed: unreadable ones by reason. hashes: of
    the images left; flat: those without one. pixels: of the images left. edits: what was changed, counted.
    benchmark_item: the item that the sample overlaps with.
    """

    id: str
    source: str
    line: int
    reason: str | None = None
    detail: str = ""
    record: dict | None = None
    removed: list[list[str]] = field(default_factory=list)
    images: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    hashes: list[int] = field(default_factory=list)
    flat: int = 0
    pixels: int = 0
    edits: dict[str, int] = field(default_factory=dict)
    benchmark_item: str | None = None
    pair: Pair | None = None

    def drop(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        self.record, self.pair, self.hashes = None, None, []

    def as_bad_sample(self) -> BadSample:
        assert self.reason is not None
        return BadSample(self.id, self.source, self.line, self.reason, self.detail)


_DEFAULTS = asdict(Outcome("", "", 0))
_NAMES = [item.name for item in fields(Outcome)]


def to_lines(outcomes: Iterable[Outcome]) -> Iterator[bytes]:
    """One JSON line each; fields at their default are left out."""
    for outcome in outcomes:
        values = asdict(outcome)
        short = {name: values[name] for name in _NAMES if values[name] != _DEFAULTS[name]}
        yield json.dumps(short, ensure_ascii=False).encode("utf-8") + b"\n"


def from_lines(lines: Iterable[bytes]) -> Iterator[Outcome]:
    """The inverse of `to_lines`."""
    for line in lines:
        values = {"id": "", "source": "", "line": 0, **json.loads(line)}
        if values.get("pair"):
            values["pair"] = Pair(**values["pair"])
        yield Outcome(**values)
