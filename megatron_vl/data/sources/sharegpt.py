"""Conversations in the ShareGPT shape, turned into the form of `data/sample.py` and checked there.

    {"id": "a", "image": "cat.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

`image` is one path or a list, `images` a list; every `<image>` takes the next one and the counts must agree. A
`system` text beside the turns becomes the first turn. Nothing is repaired: a record that does not say clearly
what it means is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sample import Sample, parse_sample
from megatron_vl.data.sources.record import Record

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class ShareGptLine(Record):
    """One line of a ShareGPT file."""

    def parse(self) -> Sample:
        return parse_converted(self.data, self.default_id, openai_record)


def parse_converted(data: bytes, default_id: str, convert) -> Sample:
    """Reads a JSON object, lets `convert` (dict to dict) bring it into the known form, and parses that.

    A line that is no JSON object goes to `parse_sample` as it is, which says what is wrong with it.
    """
    try:
        record = json.loads(data.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        return parse_sample(data, default_id)
    try:
        converted = json.dumps(convert(record)).encode()
    except SampleRefused as refusal:
        raise SampleRefused(refusal.reason, refusal.detail, _plain_id(record) or default_id) from refusal
    except (RecursionError, ValueError) as error:  # nested so deeply that it can be read, but not written
        raise SampleRefused("broken_json", str(error), default_id) from error
    return parse_sample(converted, default_id)


def openai_record(record: dict) -> dict:
    """The same record with `messages`, `role`, `content` and `images`.

    Raises SampleRefused two_forms, missing_messages, bad_message, unknown_role, bad_part.
    """
    turns = record.get("conversations")
    if "messages" in record:
        raise SampleRefused("two_forms", "has messages beside conversations; which one counts is not said")
    if not isinstance(turns, list) or not turns:
        found = ", ".join(sorted(map(str, record))[:8]) or "no key"
        raise SampleRefused(
            "missing_messages", f"conversations must be a list with at least one turn; has {found}"
        )
    messages = [_message(turn, f"conversations[{number}]") for number, turn in enumerate(turns)]
    system = record.get("system")
    if system is not None and system != "":
        if messages[0]["role"] == "system":
            raise SampleRefused("two_forms", "has a system text beside a first turn that is one")
        messages.insert(0, {"role": "system", "content": system})
    converted = {"messages": messages}
    if record.get("id") is not None:
        converted["id"] = record["id"]
    images = image_list(record)
    if images is not None:
        converted["images"] = images
    return converted


def image_list(record: dict) -> list | None:
    """The images of a record that names them as `image` or `images`, None when it does neither."""
    given = {name: record[name] for name in ("image", "images") if record.get(name) is not None}
    if len(given) == 2:
        raise SampleRefused("two_forms", "has image beside images; which one counts is not said")
    for name, value in given.items():
        if isinstance(value, list):
            return value
        if name == "image" and isinstance(value, (str, dict, bytes)):
            return [value]
        raise SampleRefused("bad_part", f"{name} must be a path or a list of paths")
    return None


def _message(turn: object, where: str) -> dict:
    if not isinstance(turn, dict) or "from" not in turn or not isinstance(turn.get("value"), str):
        raise SampleRefused("bad_message", f"{where} must be an object with from and a text as value")
    role = turn["from"]
    if not isinstance(role, str) or role not in ROLES:
        raise SampleRefused("unknown_role", f"{where}.from is {role!r:.80}; known are {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": turn["value"]}


def _plain_id(record: dict) -> str | None:
    """The record's id if it has a usable one: for the report about a record that is refused anyway."""
    value = record.get("id")
    usable = isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
    return str(value).encode("utf-8", "replace").decode() if usable else None
