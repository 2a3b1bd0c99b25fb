"""Small files of every format, written where a test asks for them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sources.record import Record, Source


def png(value: int = 0, size: tuple[int, int] = (8, 6)) -> bytes:
    """A PNG of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, (value % 256, 20, 30)).save(out, "PNG")
    return out.getvalue()


def jsonl(path: Path, records: Sequence[dict | bytes]) -> str:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def sharegpt(question: str, answer: str = "yes", **more: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def tar(
    path: Path, members: Sequence[tuple[str, bytes] | tarfile.TarInfo], format: int = tarfile.USTAR_FORMAT
) -> str:
    """A tar of (name, content) pairs, and of ready TarInfos for things that are no regular files."""
    with tarfile.open(path, "w", format=format) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            file.addfile(info, io.BytesIO(member[1]))
    return str(path)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def record(*images: str, text: str = "what?") -> bytes:
    """The .json of a sample whose user turn shows the named images."""
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "that"}]
    return json.dumps({"messages": turns}).encode()


def megatron_pair(folder: Path, documents: Sequence[Sequence[int]], code: int = 4, name: str = "text") -> str:
    """A .bin/.idx pair with one sequence per document, written from the description of the layout."""
    dtype = {4: "<i4", 5: "<i8", 8: "<u2"}[code]
    arrays = [np.array(document, dtype=dtype) for document in documents]
    (folder / f"{name}.bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    lengths = np.array([len(array) for array in arrays], dtype="<i4")
    places = np.cumsum([0, *(array.nbytes for array in arrays)])[:-1].astype("<i8")
    borders = np.arange(len(arrays) + 1, dtype="<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(arrays), len(borders))
    (folder / f"{name}.idx").write_bytes(head + lengths.tobytes() + places.tobytes() + borders.tobytes())
    return str(folder / f"{name}.bin")


def reason_of(record: Record) -> str:
    """Why a record is refused; "" when it is good."""
    try:
        record.parse()
    except SampleRefused as refusal:
        assert refusal.sample_id and refusal.detail
        return refusal.reason
    return ""


def reasons(source: Source) -> list[str]:
    return [reason_of(source[number]) for number in range(len(source))]


def quiet(line: str) -> None:
    """Says nothing."""
