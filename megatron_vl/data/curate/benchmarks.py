"""Reads a folder of benchmark files into items of text, and finds its images. Nothing is skipped silently."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sample import TextPart, parse_sample
from megatron_vl.errors import DataError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LONGEST_CELL = 1 << 30  # of a table in bytes: public ones hold whole images in base64


@dataclass(frozen=True)
class Item:
    """A prompt, or all texts of a record together. name: `file:number.field`, file relative to the folder."""

    name: str
    text: str


@dataclass
class BenchmarkFolder:
    """What a folder holds. images: paths relative to it. unused: files of other kinds, by suffix.

    without_text: records that have none of the fields, by file.
    """

    root: str
    items: list[Item] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    without_text: Counter[str] = field(default_factory=Counter)


def list_files(root: str) -> list[str]:
    """All files below the folder, relative, sorted; links to folders are not followed. DataError: no folder."""
    if not os.path.isdir(root):
        raise DataError(
            f"decontamination.benchmarks = {root}: is not a folder; give the folder of the benchmarks"
        )
    found = []
    for folder, _, names in os.walk(root):
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names]
    return sorted(found)


def read_benchmarks(root: str, fields: Sequence[str], with_images: bool) -> BenchmarkFolder:
    """All items of a folder, in the order of file names.

    Accepted: .jsonl and .json (a list, or an object of objects) with the project's samples, ShareGPT
    conversations (the human turns), or records with any of `fields`; .csv and .tsv with a header; .txt, whose
    paragraphs are items beside the whole. DataError for a file that cannot be read or gives no item: a
    benchmark that is missed unnoticed is worse than none.
    """
    folder = BenchmarkFolder(root)
    for name in list_files(root):
        suffix = Path(name).suffix.lower()
        if suffix in TEXT_SUFFIXES:
            before = len(folder.items)
            _read_file(folder, name, suffix, fields)
            if len(folder.items) == before:
                raise DataError(
                    f"{os.path.join(root, name)}: no prompt found under the keys {', '.join(fields)}; name the key in "
                    "decontamination.fields, or move the file away"
                )
        elif suffix in IMAGE_SUFFIXES and with_images:
            folder.images.append(name)
        else:
            folder.unused[suffix or name] += 1
    if not folder.items and not folder.images:
        raise DataError(
            f"decontamination.benchmarks = {root}: holds no benchmark; known are {', '.join(TEXT_SUFFIXES)}"
        )
    return folder


def texts_of_record(record: object, fields: Sequence[str]) -> list[tuple[str, str]]:
    """(field, text) of every prompt of a record, blank ones left out."""
    if isinstance(record, str):
        return [("text", record)] if record.strip() else []
    if not isinstance(record, Mapping):
        return []
    if isinstance(record.get("messages"), list) or isinstance(record.get("content"), list):
        return _texts_of_sample(record)
    if isinstance(record.get("conversations"), list):
        turns = [turn for turn in record["conversations"] if isinstance(turn, Mapping)]
        found = [
            (f"conversations[{number}]", turn.get("value"))
            for number, turn in enumerate(turns)
            if turn.get("from") in ("human", "user")
        ]
    else:
        found = [(name, record.get(name)) for name in fields]
    return [(name, text) for name, value in found if (text := _joined(value)).strip()]


def _read_file(folder: BenchmarkFolder, name: str, suffix: str, fields: Sequence[str]) -> None:
    path = os.path.join(folder.root, name)
    try:
        if suffix == ".txt":
            _read_plain(folder, name, Path(path).read_text(encoding="utf-8-sig"))
            return
        for number, record in _records(path, suffix):
            texts = texts_of_record(record, fields)
            if not texts:
                folder.without_text[name] += 1
            folder.items += [Item(f"{name}:{number}.{key}", text) for key, text in texts]
            if len(texts) > 1:  # prompts that are put together from several fields
                folder.items.append(Item(f"{name}:{number}", "\n".join(text for _, text in texts)))
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read as {suffix[1:]} ({error}); correct it or move it away"
        ) from error


def _records(path: str, suffix: str) -> Iterator[tuple[str, object]]:
    """(number for people, record) of every record of a file."""
    if suffix == ".jsonl":
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield str(number), json.loads(line)
    elif suffix == ".json":
        tree = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(tree, Mapping):
            tree = next((value for value in tree.values() if isinstance(value, list)), None) or list(
                tree.values()
            )
        if not isinstance(tree, list):
            raise ValueError("it is neither a list nor an object")
        yield from ((str(number), record) for number, record in enumerate(tree))
    else:
        csv.field_size_limit(_LONGEST_CELL)
        with open(path, encoding="utf-8-sig", newline="") as file:
            for record in csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","):
                yield str(record.get("index") or record.get("id") or "row"), record


def _read_plain(folder: BenchmarkFolder, name: str, text: str) -> None:
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    folder.items += [
        Item(f"{name}:{number}", paragraph) for number, paragraph in enumerate(paragraphs, start=1)
    ]
    if len(paragraphs) > 1:
        folder.items.append(Item(name, text))


def _texts_of_sample(record: Mapping) -> list[tuple[str, str]]:
    """User turns of a conversation, or the text of a document, in the project's format."""
    try:
        sample = parse_sample(json.dumps(record).encode(), "item")
    except SampleRefused as error:
        raise ValueError(f"a record is no sample: {error}") from error
    if sample.document:
        turns = [("content", sample.document)]
    else:
        turns = [
            (f"messages[{number}]", message.parts)
            for number, message in enumerate(sample.messages)
            if message.role == "user"
        ]
    texts = [
        (name, "\n".join(part.text for part in parts if isinstance(part, TextPart))) for name, parts in turns
    ]
    return [(name, text) for name, text in texts if text.strip()]


def _joined(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return ""
