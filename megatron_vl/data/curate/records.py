"""From a parsed sample back to a line of JSON, for samples that curation has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping

from megatron_vl.data.sample import Part, Sample, TextPart, parse_sample

_REPLACED = ("id", "messages", "text", "content", "images", "objects")


def read_record(data: bytes) -> dict:
    """The JSON object of a line that `parse_sample` has accepted."""
    return json.loads(data.decode("utf-8").removeprefix("\ufeff"))


def to_record(sample: Sample, original: Mapping[str, object], objects: list[dict] | None = None) -> dict:
    """`sample` as a record, with the keys of `original` that say nothing about text and images.

    Paths stand inside the parts, so that no list of images has to agree with the text.
    """
    extra = {name: value for name, value in original.items() if name not in _REPLACED}
    if sample.messages:
        body = {"messages": [{"role": turn.role, "content": _parts(turn.parts)} for turn in sample.messages]}
    else:
        body = {"content": _parts(sample.document)}
    return {"id": sample.id, **body, **({"objects": objects} if objects else {}), **extra}


def to_line(record: Mapping[str, object]) -> bytes:
    """One line without its newline. The record must be one that training will read.

    Raises SampleRefused as `parse_sample`, e.g. when a chosen caption holds an image placeholder.
    """
    data = json.dumps(record, ensure_ascii=False).encode("utf-8")
    parse_sample(data, str(record["id"]))
    return data


def _parts(parts: tuple[Part, ...]) -> list[dict]:
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": part.path}
        for part in parts
    ]
