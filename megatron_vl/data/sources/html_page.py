"""A web page as an interleaved document: its texts in reading order, its local images in place.

Dropped and counted: scripts, styles, navigation and the other elements of `html_rules.DROPPED`, and every
image that is not a local file. What could be the caption of an image is kept beside the document, so that
curation can choose: alt, the figcaption of its figure, the nearest text above and below it.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sample import ImagePart, Part, Sample, TextPart
from megatron_vl.data.sources.html_reader import FoundImage, PageReader
from megatron_vl.data.sources.html_rules import DEFAULT_RULE, HtmlRule
from megatron_vl.data.sources.html_tokens import tokens

_DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE)
# Only real text encodings: Python's table also holds zip, hex and rot13.
_NAMED = (
    "ascii utf-8 gbk gb2312 gb18030 big5 shift_jis euc_jp iso2022_jp euc_kr cp949 cp932 koi8-r koi8-u cp874"
)
_ENCODINGS = frozenset(
    _NAMED.split()
    + [f"iso8859-{n}" for n in (*range(1, 11), 13, 14, 15, 16)]
    + [f"cp{n}" for n in range(1250, 1259)]
)


@dataclass(frozen=True)
class PageImage:
    """One image of a page with its caption candidates, "" where there is none.

    part: number of its ImagePart in `Sample.document`. source: as written in the page.
    """

    part: int
    source: str
    alt: str
    figcaption: str
    above: str
    below: str


@dataclass(frozen=True)
class PageSample(Sample):
    """A page as a document, with what curation wants to know.

    images_of_page: one per image of the document. failed_images: (source, reason, detail) of the images left
    out. dropped: elements left out, by name. title: the page's own. max_failed_image_ratio: of its `HtmlRule`.
    """

    title: str = ""
    images_of_page: tuple[PageImage, ...] = ()
    failed_images: tuple[tuple[str, str, str], ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    max_failed_image_ratio: float | None = None

    def without_images(self, failed: dict[int, tuple[str, str]]) -> PageSample:
        """The page without the images that cannot be used. failed: (reason, detail) by number of the image.

        For what shows only when the files are looked at; the rule is that of `read_page`, over all failures.
        Raises SampleRefused failed_images, empty_page.
        """
        gone = {self.images_of_page[number].part for number in failed}
        more = [(self.images_of_page[number].source, *why) for number, why in failed.items()]
        failures = (*self.failed_images, *more)
        _refuse_too_many(failures, len(self.images_of_page) - len(failed), self.max_failed_image_ratio)
        kept = [part for part in range(len(self.document)) if part not in gone]
        parts = _trimmed([self.document[part] for part in kept])
        if not parts:
            raise SampleRefused("empty_page", "neither text nor a usable image is left")
        left = [image for number, image in enumerate(self.images_of_page) if number not in failed]
        images = tuple(replace(image, part=kept.index(image.part)) for image in left)
        return replace(self, document=parts, images_of_page=images, failed_images=failures)


def read_page(text: str, sample_id: str, folder: str, rule: HtmlRule = DEFAULT_RULE) -> PageSample:
    """The document of a page.

    folder: where the page lies, absolute or relative to the data root; image sources are relative to it.
    Raises SampleRefused too_deep, too_many_blocks, too_many_images, failed_images, empty_page.
    """
    reader = PageReader(folder, rule)
    for token in tokens(text):
        reader.take(token)
    reader.end_block()
    usable = sum(isinstance(item, FoundImage) for item in reader.items)
    _refuse_too_many(reader.failed, usable, rule.max_failed_image_ratio)
    if not reader.items:
        raise SampleRefused("empty_page", "neither text nor a local image outside the dropped elements")
    parts, images = _interleave(reader, rule.max_caption_chars)
    return PageSample(
        sample_id,
        document=parts,
        title=reader.title,
        images_of_page=images,
        failed_images=tuple(reader.failed),
        dropped=dict(reader.dropped),
        max_failed_image_ratio=rule.max_failed_image_ratio,
    )


def _refuse_too_many(failed: Sequence[tuple[str, str, str]], usable: int, limit: float | None) -> None:
    """Raises SampleRefused failed_images for a larger share of failed images than the limit, None = no limit."""
    total = len(failed) + usable
    if limit is None or len(failed) <= limit * total:
        return
    counts = Counter(reason for _, reason, _ in failed)
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    raise SampleRefused(
        "failed_images",
        f"{len(failed)} of {total} images cannot be used ({reasons}); the limit is {limit:g} of them",
    )


def _trimmed(parts: list[Part]) -> tuple[Part, ...]:
    """Without the line breaks that stood between the outermost texts and images which are gone."""
    if parts and isinstance(parts[0], TextPart):
        parts[0] = TextPart(parts[0].text.removeprefix("\n"))
    if parts and isinstance(parts[-1], TextPart):
        parts[-1] = TextPart(parts[-1].text.removesuffix("\n"))
    return tuple(parts)


def decode_page(data: bytes) -> str:
    """The text of a page: by its byte order mark, else as UTF-8, else in the encoding that it declares.

    UTF-8 comes first because crawlers convert pages and leave the old declaration in them, and text of another
    encoding is hardly ever valid UTF-8 by chance.

    Raises SampleRefused not_utf8 when it declares none or UTF-8, bad_encoding when its bytes are not text in
    the one that it declares, or that one is unknown. Nothing is replaced.
    """
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")):
        if data.startswith(mark):
            return _decoded(data[len(mark) :], encoding, "bad_encoding")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        declared = _DECLARED.search(data[:2048])
        name = declared.group(1).decode() if declared else "utf-8"
    try:
        encoding = codecs.lookup(name).name
    except LookupError:
        encoding = name
    if encoding not in _ENCODINGS:
        raise SampleRefused("bad_encoding", f"declares the encoding {name}, which is not known")
    return _decoded(data, encoding, "not_utf8" if encoding == "utf-8" else "bad_encoding")


def _decoded(data: bytes, encoding: str, reason: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise SampleRefused(
            reason, f"byte {error.start} of the page is {data[error.start]:#04x}, not text in {encoding}"
        ) from error


def _interleave(reader: PageReader, max_chars: int) -> tuple[tuple[Part, ...], tuple[PageImage, ...]]:
    """Texts joined by blank lines, images on lines of their own, and the images' caption candidates."""
    items = reader.items
    parts: list[Part] = []
    images: list[PageImage] = []
    below = _nearest(items[::-1])[::-1]
    waiting: list[str] = []

    def end_text(before_image: bool) -> None:
        if waiting:
            lead = "\n" if parts else ""
            parts.append(TextPart(lead + "\n\n".join(waiting) + ("\n" if before_image else "")))
            waiting.clear()

    for item, above_text, below_text in zip(items, _nearest(items), below):
        if isinstance(item, str):
            waiting.append(item)
            continue
        end_text(before_image=True)
        candidates = (item.alt, "\n".join(reader.captions.get(item.figure, [])), above_text, below_text)
        images.append(PageImage(len(parts), item.source, *(text[:max_chars] for text in candidates)))
        parts.append(ImagePart(item.path))
    end_text(before_image=False)
    return tuple(parts), tuple(images)


def _nearest(items: Sequence[str | FoundImage]) -> list[str]:
    """For every item the last text before it, "" where there is none."""
    last, nearest = "", []
    for item in items:
        nearest.append(last)
        if isinstance(item, str):
            last = item
    return nearest
