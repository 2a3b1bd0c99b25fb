"""One row of a table as a sample: conversations, text or parts, with images as bytes or paths.

    messages       list of {role, content}; content a text or a list of parts
    conversations  list of {from, value} (ShareGPT), or of {role, content}
    content        list of parts, a document
    text           a document
    image, images  {"bytes", "path"} or a path, one or a list; taken by the placeholders in order
    id             optional

A table gives every row every column, so a value of null, and a part's key of null, means that it is not there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sample import ImagePart, Part, Sample, parse_sample
from megatron_vl.data.sources.locator import LocatedImage
from megatron_vl.data.sources.sharegpt import image_list, openai_record

COLUMNS = ("id", "system", "messages", "conversations", "content", "text", "image", "images")
# What stands for the bytes of an image while the rest of the row is checked. No file can have such a name.
_INLINE = "\x00inline "


def sample_of_row(row: dict[str, Any], default_id: str) -> Sample:
    """The sample of a row. Raises SampleRefused as `parse_sample`, and two_forms, bad_column, no_image_bytes."""
    sample_id = default_id
    try:
        row = {name: value for name, value in row.items() if value is not None}
        if isinstance(row.get("id"), (str, int)) and row["id"] != "":
            sample_id = str(row["id"])
        blobs: list[bytes] = []
        record = _without_bytes(row, blobs)
        data = json.dumps(record, default=_refuse_type).encode()
    except SampleRefused as refusal:
        raise SampleRefused(refusal.reason, refusal.detail, sample_id) from refusal
    except (RecursionError, ValueError) as error:
        raise SampleRefused("bad_column", str(error)[:200], sample_id) from error
    return _with_bytes(parse_sample(data, default_id), blobs, default_id)


def _without_bytes(row: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
    """A record for `parse_sample` in which the bytes of images are numbered names."""
    record = {name: _plain(value, blobs) for name, value in row.items() if name not in ("image", "images")}
    for name in {"messages", "conversations"} & set(record):
        record[name] = _turns(record[name])
    images = image_list(row)
    # datasets gives rows of text an empty list
    if images:
        record["images"] = [_image(image, blobs) for image in images]
    turns = record.get("conversations")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        if any("role" in turn for turn in turns) and "messages" not in record:
            record["messages"] = record.pop("conversations")
        else:
            record = openai_record(record)
    return record


def _turns(value: Any) -> Any:
    """A list of turns; `datasets` may store one by column: {"from": [...], "value": [...]}."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if not columns or not all(isinstance(column, list) for column in columns):
        return value
    if len(set(map(len, columns))) != 1:
        raise SampleRefused("bad_column", f"turns with columns of {sorted(map(len, columns))} values")
    return [dict(zip(value, turn)) for turn in zip(*columns)]


def _plain(value: Any, blobs: list[bytes]) -> Any:
    """A value without nulls; images inside parts without their bytes."""
    if isinstance(value, list):
        return [_plain(item, blobs) for item in value]
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if item is not None}
        return {
            name: _image(item, blobs) if name == "image" and isinstance(item, dict) else _plain(item, blobs)
            for name, item in kept.items()
        }
    if isinstance(value, str) and value.startswith(_INLINE):
        raise SampleRefused("bad_column", "a text begins like the name of an image without a file")
    return value


def _image(value: Any, blobs: list[bytes]) -> Any:
    """A path, or the name that stands for the bytes."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            value = value["bytes"]
        elif value.get("bytes") is None and isinstance(value.get("path"), str):
            value = value["path"]
        else:
            keys = ", ".join(sorted(value)) or "no key"
            raise SampleRefused(
                "no_image_bytes", f"an image with {keys}, neither bytes nor a path among them"
            )
    if isinstance(value, bytes):
        blobs.append(value)
        return f"{_INLINE}{len(blobs) - 1}"
    if isinstance(value, str) and value.startswith(_INLINE):
        raise SampleRefused("bad_column", "the path of an image begins with a zero byte")
    return value


def _with_bytes(sample: Sample, blobs: list[bytes], default_id: str) -> Sample:
    def located(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(_located(part, blobs, default_id) for part in parts)

    messages = tuple(replace(message, parts=located(message.parts)) for message in sample.messages)
    return replace(sample, messages=messages, document=located(sample.document))


def _located(part: Part, blobs: list[bytes], default_id: str) -> Part:
    if not isinstance(part, ImagePart) or not part.path.startswith(_INLINE):
        return part
    number = int(part.path.removeprefix(_INLINE))
    return LocatedImage(f"{default_id} image {number}", blobs[number])


def _refuse_type(value: Any) -> Any:
    raise SampleRefused("bad_column", f"holds a value of type {type(value).__name__}")
