"""From tags and texts to blocks: what stands on a page, in reading order, without building its tree.

Bad nesting is tolerated. Only elements that decide something are followed with a stack; an end tag closes the
innermost open element of its name and all inside it, and one that fits nothing is passed over. Every step
takes constant time on average, so a page of nothing but tags costs no more than one of text.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sources.html_rules import DROPPED, HtmlRule, local_path
from megatron_vl.data.sources.html_tokens import EndTag, StartTag, Text, Token

_BLOCK_NAMES = (
    "address article aside blockquote body caption center dd details div dl dt fieldset figcaption figure form h1 h2 "
    "h3 h4 h5 h6 header hr html li main ol option p pre section summary table tbody tfoot thead tr ul"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
# Elements whose end tag is optional (p, li, tr, ...) and inline ones are not followed: they decide nothing but
# where a block ends, and good pages leave thousands of them open.
_FOLLOWED_NAMES = "article aside body div figcaption figure header main ol pre section table ul"
_FOLLOWED = DROPPED | frozenset(_FOLLOWED_NAMES.split())


@dataclass(frozen=True)
class FoundImage:
    """An image that is a local file. figure: number of its figure element, None outside of one."""

    path: str
    source: str
    alt: str
    figure: int | None


@dataclass
class PageReader:
    """Takes the tokens of a page. items: texts and images in reading order. captions: figcaptions by figure.

    failed: (source, reason, detail) of unusable images. dropped: elements left out, by name.
    """

    folder: str
    rule: HtmlRule
    items: list[str | FoundImage] = field(default_factory=list)
    captions: dict[int, list[str]] = field(default_factory=dict)
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    title: str = ""
    _open: list[str] = field(default_factory=list)
    _open_count: Counter[str] = field(default_factory=Counter)
    _dropping_from: int | None = None  # depth at which the dropped element stands
    _figures: list[int] = field(default_factory=list)
    _figures_seen: int = 0
    _images_seen: int = 0
    _text: list[str] = field(default_factory=list)
    _has_words: bool = False
    _new_cell: bool = False

    def take(self, token: Token) -> None:
        """Goes on by one token. Raises SampleRefused too_deep, too_many_blocks, too_many_images."""
        if isinstance(token, Text):
            self._words(token.text)
        elif isinstance(token, StartTag):
            self._start(token)
        elif isinstance(token, EndTag):
            self._end(token.name)

    def end_block(self) -> None:
        """Ends the block of text that is being read; to be called once at the end of the page."""
        if not self._has_words:
            self._text.clear()
            return
        lines = [line.rstrip() for line in "".join(self._text).splitlines()]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        self._text.clear()
        self._has_words = self._new_cell = False
        if self._figures and self._open_count["figcaption"]:
            self.captions.setdefault(self._figures[-1], []).append(text)
        self._add(text)

    def _words(self, text: str) -> None:
        if self._dropping_from is not None:
            if self._open[-1] == "title" and not self.title:
                self.title = " ".join(text.split())
            return
        blank = not text.strip()
        if self._new_cell and not blank:
            if self._has_words:
                self._text.append(" | ")
            self._new_cell = False
        if self._open_count["pre"]:
            self._text.append(text)
        else:
            text = re.sub(r"\s+", " ", text)
            behind_space = not self._text or self._text[-1].endswith((" ", "\n"))
            if behind_space:
                text = text.removeprefix(" ")
            if text:
                self._text.append(text)
        self._has_words = self._has_words or not blank

    def _start(self, tag: StartTag) -> None:
        name = tag.name
        if self._dropping_from is None:
            if name in _BLOCKS or name in DROPPED:
                self.end_block()
            if name == "br":
                if self._has_words:  # a block does not begin with empty lines
                    self._text.append("\n")
            elif name in ("td", "th"):
                self._new_cell = True
            elif name == "img":
                self._image(tag.attributes)
        if name not in _FOLLOWED:
            return
        self._open.append(name)
        self._open_count[name] += 1
        if len(self._open) > self.rule.max_depth:
            raise SampleRefused("too_deep", f"more than {self.rule.max_depth} elements inside each other")
        if name in DROPPED and self._dropping_from is None:
            self._dropping_from = len(self._open)
            self.dropped[name] += 1
        elif name == "figure":
            self._figures_seen += 1
            self._figures.append(self._figures_seen)

    def _end(self, name: str) -> None:
        if self._dropping_from is None and name in _BLOCKS:
            self.end_block()
        while self._open_count[name]:
            closed = self._open.pop()
            self._open_count[closed] -= 1
            if closed == "figure" and self._figures:
                self._figures.pop()
            if closed == name:
                break
        if self._dropping_from is not None and len(self._open) < self._dropping_from:
            self._dropping_from = None

    def _image(self, attributes: dict[str, str]) -> None:
        self.end_block()
        self._images_seen += 1
        if self._images_seen > self.rule.max_images:
            raise SampleRefused("too_many_images", f"more than {self.rule.max_images} images")
        # pages that load late keep the real source in data-src
        source = attributes.get("src") or attributes.get("data-src") or ""
        try:
            path = local_path(source, self.folder)
        except SampleRefused as refusal:
            self.failed.append((source[:200], refusal.reason, refusal.detail))
            return
        figure = self._figures[-1] if self._figures else None
        self._add(FoundImage(path, source[:200], " ".join(attributes.get("alt", "").split()), figure))

    def _add(self, item: str | FoundImage) -> None:
        self.items.append(item)
        if len(self.items) > self.rule.max_blocks:
            raise SampleRefused("too_many_blocks", f"more than {self.rule.max_blocks} texts and images")
