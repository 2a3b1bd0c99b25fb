"""What one line of training data says: a conversation or a document, as text and images, checked strictly.

Only the line itself is looked at; images are resolved and opened later (`data/rows.py`). Accepted forms:

    {"id": "a", "messages": [{"role": "user", "content": "text"}, {"role": "assistant", "content": [PART,
    ...]}]} {"id": "b", "text": "a document"}    {"id": "c", "content": [PART, ...]}
    PART = {"type": "text", "text": "..."} | {"type": "image", "image": "relative/path.png"}
         | {"type": "image_url", "image_url": {"url": "relative/path.png"}}

Instead of paths inside the parts, a top-level "images": ["path", ...] may be given; then each "<image>" in a
text and each {"type": "image"} part without a path takes the next one, and the counts must agree. Other keys
are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from megatron_vl.data.bad_samples import SampleRefused

ROLES = ("system", "user", "assistant")
IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class TextPart:
    """text: never empty, valid Unicode (encodable as UTF-8)."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """path: as written in the data, relative to the data root; not yet resolved."""

    path: str


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Message:
    """One turn. role: one of ROLES. parts: at least one; assistant turns hold text only."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """A conversation (`messages`) or a document (`document`); the other of the two is empty."""

    id: str
    messages: tuple[Message, ...] = ()
    document: tuple[Part, ...] = ()

    @property
    def images(self) -> list[ImagePart]:
        """All images in the order in which they stand in the text."""
        parts = [part for message in self.messages for part in message.parts] or self.document
        return [part for part in parts if isinstance(part, ImagePart)]


def parse_sample(data: bytes, default_id: str) -> Sample:
    """Reads one line.

    Raises SampleRefused with one of the reasons not_utf8, broken_json, not_an_object, bad_id,
    missing_messages, bad_message, unknown_role, empty_message, unknown_part, bad_part, bad_text,
    image_in_assistant, image_count.
    """
    sample_id = default_id
    try:
        record = _json_object(data)
        sample_id = _sample_id(record, default_id)
        kinds = [key for key in ("messages", "text", "content") if key in record]
        if len(kinds) != 1:
            found = f"has {' and '.join(kinds)}" if kinds else f"has only {_keys(record)}"
            raise SampleRefused(
                "missing_messages", f"{found}; one of messages, text or content must be given"
            )
        images = _ImageList(record)
        if kinds[0] == "messages":
            sample = Sample(sample_id, messages=_messages(record["messages"], images))
        else:
            sample = Sample(sample_id, document=_parts(record[kinds[0]], "the document", images))
        images.check_all_used()
        return sample
    except SampleRefused as refusal:
        raise SampleRefused(refusal.reason, refusal.detail, sample_id) from refusal
    except RecursionError as error:  # nested so deeply that it can be read, but not shown
        raise SampleRefused("broken_json", str(error), sample_id) from error


def _json_object(data: bytes) -> dict:
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SampleRefused(
            "not_utf8", f"byte {error.start} of the line is {data[error.start]:#04x}"
        ) from error
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleRefused("broken_json", str(error)) from error
    if not isinstance(record, dict):
        raise SampleRefused("not_an_object", f"the line is a {_json_type(record)}, not a JSON object")
    return record


def _sample_id(record: dict, default_id: str) -> str:
    value = record.get("id")
    if value is None:
        return default_id
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise SampleRefused("bad_id", f"id is {_shown(value)}; it must be a string or an integer")
    return _checked_text(str(value), "id")


def _messages(value: object, images: _ImageList) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise SampleRefused(
            "missing_messages", f"messages is {_shown(value)}; it must be a list with at least one turn"
        )
    return tuple(_message(item, f"messages[{number}]", images) for number, item in enumerate(value))


def _message(item: object, where: str, images: _ImageList) -> Message:
    if not isinstance(item, dict) or "role" not in item or "content" not in item:
        raise SampleRefused(
            "bad_message", f"{where} is {_shown(item)}; it must be an object with role and content"
        )
    role = item["role"]
    if role not in ROLES:
        raise SampleRefused("unknown_role", f"{where}.role is {_shown(role)}; known are {', '.join(ROLES)}")
    parts = _parts(item["content"], f"{where}.content", images)
    if role == "assistant" and any(isinstance(part, ImagePart) for part in parts):
        raise SampleRefused(
            "image_in_assistant", f"{where} is an assistant turn with an image; the model writes text only"
        )
    return Message(role, parts)


def _parts(content: object, where: str, images: _ImageList) -> tuple[Part, ...]:
    """The parts of a turn or document; empty texts are left out, but something must remain."""
    if isinstance(content, str):
        parts = images.fill(_checked_text(content, where))
    elif isinstance(content, list):
        parts = [
            part for number, item in enumerate(content) for part in _part(item, f"{where}[{number}]", images)
        ]
    else:
        raise SampleRefused(
            "bad_message", f"{where} is {_shown(content)}; it must be a string or a list of parts"
        )
    if not parts:
        raise SampleRefused("empty_message", f"{where} has neither text nor image")
    return tuple(parts)


def _part(item: object, where: str, images: _ImageList) -> list[Part]:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise SampleRefused(
                "bad_part", f"{where}.text is {_shown(item.get('text'))}; it must be a string"
            )
        return images.fill(_checked_text(item["text"], where))
    if kind == "image":
        return [ImagePart(_path(item["image"], f"{where}.image"))] if "image" in item else [images.next()]
    if kind == "image_url":
        target = item.get("image_url")
        target = target.get("url") if isinstance(target, dict) else target
        return [ImagePart(_path(target, f"{where}.image_url"))]
    raise SampleRefused("unknown_part", f"{where} is {_shown(item)}; known types are text, image, image_url")


class _ImageList:
    """The top-level "images" of a record, handed out in the order in which placeholders ask for them."""

    def __init__(self, record: dict):
        value = record.get("images")
        if value is not None and not isinstance(value, list):
            raise SampleRefused("bad_part", f"images is {_shown(value)}; it must be a list of paths")
        self._paths = [_path(item, f"images[{number}]") for number, item in enumerate(value or [])]
        self._asked = 0

    def next(self) -> ImagePart:
        """The next image; beyond the end an empty path, since `check_all_used` refuses the sample anyway."""
        self._asked += 1
        return ImagePart(self._paths[self._asked - 1] if self._asked <= len(self._paths) else "")

    def fill(self, text: str) -> list[Part]:
        """Cuts a text at its placeholders.

        They count also where no list is given: a record that lost its images must not train as text.
        """
        pieces = text.split(IMAGE_PLACEHOLDER)
        parts: list[Part] = [TextPart(pieces[0])] if pieces[0] else []
        for piece in pieces[1:]:
            parts.append(self.next())
            if piece:
                parts.append(TextPart(piece))
        return parts

    def check_all_used(self) -> None:
        if self._asked != len(self._paths):
            raise SampleRefused(
                "image_count",
                f"{len(self._paths)} images in the list, but {self._asked} placeholders in the text",
            )


def _path(value: object, where: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str) or not value:
        raise SampleRefused("bad_part", f"{where} is {_shown(value)}; it must be the path of an image")
    return _checked_text(value, where)


def _checked_text(text: str, where: str) -> str:
    r"""Refuses lone surrogates, which JSON can spell ("\ud800") but no tokenizer or file name can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleRefused(
            "bad_text", f"{where} holds the lone surrogate U+{ord(text[error.start]):04X}"
        ) from error
    return text


def _json_type(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def _keys(record: dict) -> str:
    return ", ".join(sorted(str(key) for key in record)[:8]) or "no key"


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
