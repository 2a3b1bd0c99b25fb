"""HTML text as a stream of tags and texts, in time linear in its length whatever it holds.

Why not html.parser: in Python 3.11.7, which this package supports, it is quadratic and worse on unfinished
tags (64 KB of "<a " kept a busy core for 55 s: one hung worker per such page), and how it reads comments,
scripts and unfinished tags depends on the patch release, so that one page could give two samples.

The rules are those of the HTML standard's tokenizer as far as they decide what is text: raw text in script and
style, quoted attributes that may hold ">", comments, and a tag that is never finished swallows the rest.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Elements whose content is not markup.
_RAW_TEXT = ("script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes")
_END_OF = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in _RAW_TEXT}
# A "<" before anything else is text.
_MARKUP = re.compile(r"<(?=[A-Za-z!/?])")
_TAG_NAME = re.compile(r"[A-Za-z][^\s/>\x00]*")
_SPACE_OR_SLASH = re.compile(r"[\s/]*")
_SPACE = re.compile(r"\s*")
_ATTRIBUTE_NAME = re.compile(r"[^\s/>][^\s/>=]*")
_BARE_VALUE = re.compile(r"[^\s>]*")


@dataclass(frozen=True)
class Text:
    """text: character references resolved."""

    text: str


@dataclass(frozen=True)
class StartTag:
    """name and attribute names in lower case; of an attribute given twice the first counts."""

    name: str
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EndTag:
    name: str


Token = Text | StartTag | EndTag


def tokens(page: str) -> Iterator[Token]:
    """Tags and texts of a page in order; comments, declarations and processing instructions are left out."""
    position, end = 0, len(page)
    while position < end:
        found = _MARKUP.search(page, position)
        start = found.start() if found else end
        if start > position:
            yield Text(html.unescape(page[position:start]))
        if start == end:
            return
        position, token = _markup(page, start)
        if token is not None:
            yield token
        if isinstance(token, StartTag) and token.name in _RAW_TEXT:
            closing = _END_OF[token.name].search(page, position)
            stop = closing.start() if closing else end
            raw = page[position:stop]
            if raw:
                yield Text(html.unescape(raw) if token.name in ("title", "textarea") else raw)
            position = stop


def _markup(page: str, start: int) -> tuple[int, Token | None]:
    """(position behind, token or None) of what begins with the "<" at `start`."""
    following = page[start + 1 : start + 2]
    if following == "!":
        if page.startswith("<!--", start):
            # "<!-->" and "<!--->" are empty comments
            stop = page.find("-->", start + 2)
            return (len(page) if stop < 0 else stop + 3), None
        return _behind(page, ">", start), None
    if following == "?":
        return _behind(page, ">", start), None
    if following == "/":
        name = _TAG_NAME.match(page, start + 2)
        stop = _behind(page, ">", start)
        return stop, EndTag(name.group().lower()) if name and page[stop - 1] == ">" else None
    name = _TAG_NAME.match(page, start + 1)
    stop, attributes = _attributes(page, name.end())
    return stop, None if attributes is None else StartTag(name.group().lower(), attributes)


def _attributes(page: str, position: int) -> tuple[int, dict[str, str] | None]:
    """(position behind the ">", attributes); None for a tag that the page does not finish."""
    attributes: dict[str, str] = {}
    while True:
        position = _SPACE_OR_SLASH.match(page, position).end()
        if position >= len(page):
            return len(page), None
        if page[position] == ">":
            return position + 1, attributes
        name = _ATTRIBUTE_NAME.match(page, position)
        position = _SPACE.match(page, name.end()).end()
        value = ""
        if page[position : position + 1] == "=":
            position = _SPACE.match(page, position + 1).end()
            quote = page[position : position + 1]
            if quote in ('"', "'"):
                stop = page.find(quote, position + 1)
                if stop < 0:
                    return len(page), None
                value, position = page[position + 1 : stop], stop + 1
            else:
                bare = _BARE_VALUE.match(page, position)
                value, position = bare.group(), bare.end()
        attributes.setdefault(name.group().lower(), html.unescape(value))


def _behind(page: str, mark: str, start: int) -> int:
    stop = page.find(mark, start)
    return len(page) if stop < 0 else stop + len(mark)
