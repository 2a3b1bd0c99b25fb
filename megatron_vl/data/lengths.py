"""The length index of a domain: tokens and views of every sample, made once and kept on disk.

Planning needs lengths, not contents. A folder per domain holds `lengths.npy` (int32 [n, 3]: tokens, global
views, crops), `reasons.npy` (uint8 [n], 0 = good), `contents.npy` (uint64 [samples], a checksum of each record) and
`index.json`, which is written last and says what the index was made from: the files with sizes and times of change,
the rules for images, and a fingerprint of tokenizer and template. Building is in `data/lengths_build.py`. Under
data.packing.overlong = split_turns the n entries are documents: samples, or pieces of them, which `pieces.npy` (int64
[n, 4]) tells of; checksums stay per sample.

**Which data are the same.** Measuring reads every record anyway, so its checksum costs nothing but 8 bytes. The
identity of the data is these checksums with the sizes of the files and the rules; paths and times of change are not
part of it, so that a copied folder continues a run. They only decide when to look: where they are as they were, the
contents are believed; where not, every record is read again and compared (`lengths_build`), once, by the process
that builds. A file that was edited behind an unchanged time and size is found when its first changed sample is
trained on, since each is compared as it is loaded (`data/packed.py`). Not covered, as before, are pixels: an image
that was replaced is noticed when its views or its tokens differ.

An index whose contents or rules have changed since is an ERROR that names what changed, never rebuilt silently:
other lengths mean another order of the data, and a run in progress could not be continued. Remove the folder
to have it built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

from megatron_vl.config.schema import DataConfig
from megatron_vl.data.crops import plan_crops
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.sample import ImagePart, Message, Sample, TextPart
from megatron_vl.data.turns import WHOLE, Piece, SplitRule
from megatron_vl.errors import DataError

FORMAT = 2
GOOD = 0
LENGTHS_FILE, REASONS_FILE, CONTENTS_FILE = "lengths.npy", "reasons.npy", "contents.npy"
PIECES_FILE, DESCRIPTION_FILE = "pieces.npy", "index.json"
PARTS_FOLDER = "parts"
_PROBE_SIZES = ((40, 30), (728, 364), (1050, 250), (1920, 1080), (9000, 200))


class Source(Protocol):
    """Samples by number, as `data.jsonl.JsonlSource` gives them. Travels to worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawLine: ...

    def describe(self) -> list[dict[str, int | str]]:
        """Per file at least `path`, `bytes`, `samples`."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class LengthIndex:
    """Lengths of one domain. tokens, globals_, crops: int32 [n], all 0 for a refused sample.

    n: documents; each is a sample, unless pieces is given: int64 [n, 4], sample, number of the piece (0 = the whole
    sample), first message and end; all pieces of a sample lie together. tokens: true length, unlimited by
    data.seq_length. reasons: uint8 [n] into `reason_names`, 0 = good.
    digest: of what it was made from. folder: where it is kept; other processes map the same files. contents:
    uint64 [samples], checksums of the records. left_out: images that pages go without, by reason.
    """

    name: str
    tokens: np.ndarray
    globals_: np.ndarray
    crops: np.ndarray
    reasons: np.ndarray
    reason_names: tuple[str, ...]
    digest: str
    folder: Path | None = None
    contents: np.ndarray | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    pieces: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_samples(self) -> int:
        """Samples of the source."""
        if self.pieces is None:
            return len(self)
        return int(self.pieces[-1, 0]) + 1 if len(self.pieces) else 0

    def part(self, index: int) -> tuple[int, Piece]:
        """The sample that document `index` is taken from, and which part of it."""
        if self.pieces is None:
            return index, WHOLE
        sample, *piece = self.pieces[index].tolist()
        return sample, Piece(*piece)

    def split(self) -> tuple[int, int]:
        """Number of samples that are cut, and of the pieces that they make."""
        if self.pieces is None:
            return 0, 0
        return int((self.pieces[:, 1] == 1).sum()), int((self.pieces[:, 1] > 0).sum())

    def reason(self, index: int) -> str:
        """Why a sample is refused, "" for a good one."""
        return self.reason_names[self.reasons[index]]

    def refused(self) -> dict[str, int]:
        """Number of refused samples by reason, the most frequent first."""
        counts = np.bincount(self.reasons, minlength=len(self.reason_names))
        named = Counter(
            {name: int(count) for name, count in zip(self.reason_names, counts) if name and count}
        )
        return dict(named.most_common())

    def __reduce__(self):
        if self.folder is None:
            return LengthIndex, tuple(getattr(self, one.name) for one in fields(self))
        return _mapped, (self.folder, self.name, self.reason_names, self.digest, self.left_out)


def index_folder(index_dir: str | os.PathLike, name: str) -> Path:
    """The folder of a domain's index; any domain name is a legal one."""
    return Path(index_dir) / f"{quote(name, safe='')}.lengths"


def made_from(
    source: Source, builder: RowBuilder, reading: str = "", split: SplitRule | None = None
) -> dict[str, Any]:
    """What decides the lengths: data files, rules, and a fingerprint of tokenizer and template.

    reading: how the source reads its files, where there is more than one way (its form, its own rules). split: how
    over-long conversations are cut. Raises DataError when a data file has gone.
    """
    files = []
    for file in source.describe():
        try:
            changed = os.stat(file["path"]).st_mtime_ns
        except OSError as error:
            raise DataError(f"{file['path']}: cannot be read ({error.strerror}); correct its path") from error
        files.append({**file, "changed_ns": changed})
    data = builder.data
    pieces = {} if split is None else {"split_turns": asdict(split)}
    return {
        "format": FORMAT,
        "files": files,
        "rules": {
            "data_root": data.data_root,
            "reading": reading,
            "loss_on": data.loss_on,
            "boundary_rule": data.boundary_rule,
            "max_crops": data.max_crops,
            "max_aspect_ratio": data.max_aspect_ratio,
            "apply_exif": data.apply_exif,
            "max_image_pixels": data.max_image_pixels,
            **_refusals_of_backend(data),
            **pieces,
        },
        "tokenizer": hashlib.sha256(Path(data.tokenizer).read_bytes()).hexdigest(),
        "template": template_fingerprint(builder),
    }


def checksum(raw: RawLine) -> int:
    """64 bits over all that a record says: BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(raw.content(), digest_size=8).digest(), "little")


def identity_of(description: dict[str, Any]) -> dict[str, Any]:
    """What must not change, of a `made_from`: without places and times, which a copy has of its own."""
    files = [
        {key: value for key, value in file.items() if key not in ("path", "changed_ns")}
        for file in description["files"]
    ]
    rules = {key: value for key, value in description["rules"].items() if key != "data_root"}
    return {**description, "files": files, "rules": rules}


def places_of(description: dict[str, Any]) -> dict[str, Any]:
    """The rest: where the data lie, and when the files were changed."""
    files = [{key: file[key] for key in ("path", "changed_ns")} for file in description["files"]]
    return {"files": files, "data_root": description["rules"]["data_root"]}


def _refusals_of_backend(data: DataConfig) -> dict[str, Any]:
    """What DALI refuses beyond the rules depends on alpha; indexes of the other back end stay as they are."""
    return {} if data.image_backend == "torch" else {"image_backend": [data.image_backend, data.alpha]}


def digest_of(description: dict[str, Any]) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def template_fingerprint(builder: RowBuilder) -> str:
    """sha256 of what the template makes of a conversation and a document: it changes with any of its rules."""
    parts = (ImagePart("a"), TextPart("Count: 3 + 4? Zähle das. "), ImagePart("b"), TextPart("数え\n"))
    answer = (TextPart("<think>seven</think>\n7."),)
    turns = (Message("system", parts[1:2]), Message("user", parts), Message("assistant", answer)) * 2
    samples = (Sample("probe", messages=turns), Sample("probe", document=parts))
    seen = hashlib.sha256()
    for size in _PROBE_SIZES:
        plan = plan_crops(*size, builder.images.crop_rule)
        for sample in samples:
            for array in builder.template.render(sample, [plan] * len(sample.images)):
                seen.update(array.tobytes())
    return seen.hexdigest()


def open_index(folder: Path, name: str, description: dict[str, Any]) -> LengthIndex | None:
    """The index in `folder`, None when it is not (completely) built.

    description: `made_from` of the data as they are now. Arrays are mapped, not read. Raises DataError when
    the index is older than the data or was made under other rules, or is damaged.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        return None
    remedy = f"remove {folder} to have it built anew"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        then = record["made_from"]
        changed = list(differences(identity_of(then), identity_of(json.loads(json.dumps(description)))))
        if changed:
            shown = "; ".join(changed[:4]) + ("; ..." if len(changed) > 4 else "")
            raise DataError(
                f"the length index of domain {name} does not belong to the data any more: {shown}; a run that "
                f"began with it must get those data back; otherwise {remedy}"
            )
        digest = digest_of({**identity_of(then), "contents": record["contents"]})
        index = _mapped(folder, name, tuple(record["reasons"]), digest, record["left_out"])
        samples = sum(int(file["samples"]) for file in then["files"])
        sizes = {len(index), len(index.crops), len(index.reasons)}
        if index.pieces is not None:
            sizes.add(len(index.pieces))
        counts = {index.num_samples, len(index.contents), samples}
        if len(sizes) > 1 or len(counts) > 1 or int(index.reasons.max()) >= len(index.reason_names):
            raise ValueError(f"{len(index)} lengths and {len(index.reasons)} reasons for {samples} samples")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"the length index {folder} is damaged ({error}); {remedy}") from error
    return index


def _mapped(
    folder: Path, name: str, reason_names: tuple[str, ...], digest: str, left_out: dict[str, int]
) -> LengthIndex:
    names = [LENGTHS_FILE, REASONS_FILE, CONTENTS_FILE]
    if (folder / PIECES_FILE).is_file():
        names.append(PIECES_FILE)
    lengths, reasons, contents, *pieces = (
        np.load(folder / file, mmap_mode="r", allow_pickle=False) for file in names
    )
    columns = (lengths[:, n] for n in range(3))
    return LengthIndex(name, *columns, reasons, reason_names, digest, folder, contents, left_out, *pieces)


def places_that_differ(folder: Path, description: dict[str, Any]) -> list[str]:
    """Paths and times of a finished index that are not those of the description."""
    then = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))["made_from"]
    return list(differences(places_of(then), places_of(description)))


def wait_for_index(
    folder: Path,
    name: str,
    description: dict[str, Any],
    silent_seconds: float = 600,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> LengthIndex:
    """Opens an index that another process builds, as soon as it is complete.

    For the ranks that do not build: a collective would run into its time limit. Raises DataError when nothing
    new appears in the folder for `silent_seconds`, and as `open_index`.
    """
    seen, since = -1, clock()
    while (index := open_index(folder, name, description)) is None:
        parts = sum(1 for _ in folder.glob(f"{PARTS_FOLDER}/*"))
        if parts != seen:
            seen, since = parts, clock()
        if clock() - since > silent_seconds:
            raise DataError(
                f"{folder}: nobody has worked on this length index for {silent_seconds:g} s; the first rank "
                "builds it, and the folder must be on a file system that all nodes share"
            )
        sleep(1.0)
    return index


def differences(then: Any, now: Any, path: str = "") -> Iterator[str]:
    """Leaves that differ, as `files[0].bytes was 10, is 12`."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (one, other) in enumerate(zip(then, now)):
            here = other.get("path", number) if isinstance(other, dict) else number
            yield from differences(one, other, f"{path}[{here}]")
    elif isinstance(then, list) and isinstance(now, list):
        yield f"{path}: {len(then)} then, {len(now)} now"
    elif then != now:
        yield f"{path} was {then}, is {now}"
