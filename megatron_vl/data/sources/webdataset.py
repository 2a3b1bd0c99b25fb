"""WebDataset shards as a source: samples by number, images read by their offset in the tar.

What a sample may be:

* `key.json` with messages, content or text (data/sample.py), or conversations (ShareGPT);
* `key.json` with a caption, or `key.txt`: a caption, which becomes a document with the images before it.

A `key.json` without any of these beside a `key.txt` is taken for metadata, as img2dataset writes it. In a
record an image is named by its extension (`0.jpg`) or whole name; if the record names none, its `<image>`
placeholders take the images in order: `jpg` first, then by number. Every image of a sample must be used.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sample import ImagePart, Part, Sample, TextPart, parse_sample
from megatron_vl.data.sources.files import IndexedFiles
from megatron_vl.data.sources.locator import FileSlice, LocatedImage
from megatron_vl.data.sources.record import Record
from megatron_vl.data.sources.sharegpt import openai_record

LARGEST_TEXT_BYTES = 64 << 20
_FORMS = ("messages", "content", "text")


@dataclass(frozen=True)
class TarSample(Record):
    """One sample of a shard. data: its .json, if it has one. caption: its .txt. images: extension -> bytes.

    too_large: bytes of a .json or .txt that were not read, 0 = all were.
    """

    key: str = ""
    has_json: bool = False
    caption: bytes | None = None
    images: dict[str, FileSlice] = field(default_factory=dict)
    too_large: int = 0

    @property
    def default_id(self) -> str:
        return f"{os.path.basename(self.source)}:{self.key}"

    def parse(self) -> Sample:
        """Conversation or document. Raises SampleRefused as `parse_sample`, and text_too_large, two_forms,
        missing_member, image_count."""
        if self.too_large:
            raise SampleRefused(
                "text_too_large",
                f"a text of {self.too_large} bytes, the limit is {LARGEST_TEXT_BYTES}",
                self.default_id,
            )
        record = self._json_record()
        if record is None:  # parse_sample says what is wrong with the bytes
            sample = parse_sample(self.data, self.default_id)
        elif any(form in record for form in (*_FORMS, "conversations")):
            sample = self._from_record(record)
        elif self.caption is not None or isinstance(record.get("caption"), str):
            return self._captioned(record)
        else:
            sample = parse_sample(self.data, self.default_id)
        return self._with_places(sample)

    def content(self) -> bytes:
        """Its texts, and names and lengths of its images; their bytes are not part of it."""
        images = [[name, image.length] for name, image in self.images.items()]
        rest = json.dumps([self.has_json, self.too_large, images, self.caption is not None]).encode()
        return b"\0".join((self.data, self.caption or b"", rest))

    def _json_record(self) -> dict | None:
        if not self.has_json:
            return {}
        try:
            record = json.loads(self.data.decode("utf-8").removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) else None

    def _from_record(self, record: dict) -> Sample:
        try:
            if "conversations" in record:
                record = openai_record(record)
            if self.images and "images" not in record and not _names_images(record):
                record = {**record, "images": list(self.images)}
            data = json.dumps(record).encode()
        except SampleRefused as refusal:
            raise SampleRefused(refusal.reason, refusal.detail, self.default_id) from refusal
        except (RecursionError, ValueError) as error:
            raise SampleRefused("broken_json", str(error), self.default_id) from error
        return parse_sample(data, self.default_id)

    def _captioned(self, record: dict) -> Sample:
        """The images, then the caption on a line of its own."""
        try:
            text = record["caption"] if self.caption is None else self.caption.decode("utf-8")
            text.encode("utf-8")  # JSON can spell lone surrogates
        except UnicodeError as error:
            raise SampleRefused("not_utf8", f"the caption is not UTF-8: {error}", self.default_id) from error
        parts: list[Part] = [self._located(name) for name in self.images]
        if text.strip():
            parts.append(TextPart(f"\n{text.strip()}" if parts else text.strip()))
        if not any(isinstance(part, TextPart) for part in parts):
            raise SampleRefused("empty_message", "the caption is empty", self.default_id)
        return Sample(self.default_id, document=tuple(parts))

    def _with_places(self, sample: Sample) -> Sample:
        """The sample with every image's place in the shard. All images must be used, none may be missing."""
        names = [image.path for image in sample.images]
        extensions = [self._extension(name) for name in names]
        missing = [name for name, extension in zip(names, extensions) if extension not in self.images]
        if missing:
            raise SampleRefused(
                "missing_member", f"no image {missing[0]!r:.120} in the sample {self.key!r}", sample.id
            )
        unused = [name for name in self.images if name not in extensions]
        if unused:
            raise SampleRefused(
                "image_count", f"{len(unused)} images are not used, the first is {unused[0]}", sample.id
            )
        places = iter([self._located(extension) for extension in extensions])

        def located(parts: tuple[Part, ...]) -> tuple[Part, ...]:
            return tuple(next(places) if isinstance(part, ImagePart) else part for part in parts)

        return replace(
            sample,
            messages=tuple(replace(message, parts=located(message.parts)) for message in sample.messages),
            document=located(sample.document),
        )

    def _extension(self, name: str) -> str:
        """`1.PNG`, `chat.1.PNG` and `d/chat.1.PNG` all mean the image `1.png` of the sample `d/chat`."""
        for start in (f"{self.key}.", f"{os.path.basename(self.key)}."):
            if name.lower() not in self.images:
                name = name.removeprefix(start)
        return name.lower()

    def _located(self, extension: str) -> LocatedImage:
        return LocatedImage(f"{self.source}/{self.key}.{extension}", self.images[extension])


class WebDatasetSource(IndexedFiles):
    """Samples of indexed shards."""

    def _read(self, number: int, within: int) -> TarSample:
        file, arrays = self.files[number], self.files[number].scan.arrays
        texts, too_large = {}, 0
        for name in ("json", "txt"):
            offset, length = map(int, arrays[name][2 * within : 2 * within + 2])
            if length > LARGEST_TEXT_BYTES:
                too_large = length
            elif offset >= 0:
                texts[name] = self._bytes_at(number, offset, length)
        images = {}
        for image in range(int(arrays["first_image"][within]), int(arrays["first_image"][within + 1])):
            extension = _piece(arrays, "extensions", "extension_end", image)
            offset, length = map(int, arrays["image"][2 * image : 2 * image + 2])
            images[extension] = FileSlice(file.path, offset, length)
        return TarSample(
            file.path,
            int(arrays["line"][within]),
            texts.get("json", b""),
            _piece(arrays, "names", "key_end", within),
            "json" in texts,
            texts.get("txt"),
            images,
            too_large,
        )


def _piece(arrays: dict, text: str, ends: str, number: int) -> str:
    begin = int(arrays[ends][number - 1]) if number else 0
    return arrays[text][begin : int(arrays[ends][number])].tobytes().decode()


def _names_images(record: dict) -> bool:
    """Whether any part of the record says by name which image it is."""
    turns = record.get("messages") if isinstance(record.get("messages"), list) else [record]
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and ("image" in part or "image_url" in part):
                return True
    return False
