"""What a page may hold, which elements are dropped, and which image sources are local files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.image_checks import _SCHEME as SCHEME

_DROPPED = (
    "script style nav template noscript svg math iframe object canvas video audio select button textarea datalist "
    "footer title"
)
DROPPED = frozenset(_DROPPED.split())


@dataclass(frozen=True)
class HtmlRule:
    """Limits of a page, and when a page is given up.

    max_bytes: of the file. max_depth: followed elements inside each other. max_blocks: texts and images of
    the document. max_images: images of the page, usable or not. max_failed_image_ratio: a page is refused
    when a larger share of its images cannot be used (recipe.md 4: strictly more than 0.9); None = never.
    max_caption_chars: longer caption candidates are cut.
    """

    max_bytes: int = 4 << 20
    max_depth: int = 1_000
    max_blocks: int = 50_000
    max_images: int = 2_000
    max_failed_image_ratio: float | None = 0.9
    max_caption_chars: int = 2_000


DEFAULT_RULE = HtmlRule()


def local_path(source: str, folder: str) -> str:
    """The path of an image source, fit for `image_checks.resolve_under`; whether it exists is not looked at.

    source: as written in the page. folder: where the page lies. A source that begins with "/" is relative to
    the data root, as it was to the root of the site. `..` stays, since pages use it: leaving the data root is
    refused where the path is resolved. Raises SampleRefused image_inline, image_remote, image_no_source,
    image_bad_path.
    """
    source = source.strip()
    if source[:5].lower() == "data:":
        raise SampleRefused("image_inline", f"{source[:40]}... is written into the page")
    if SCHEME.match(source) or source.startswith(("//", "\\\\")):
        raise SampleRefused("image_remote", f"{source[:200]} is on the network")
    path = re.split(r"[?#]", source, maxsplit=1)[0]
    if not path.strip("/"):
        raise SampleRefused("image_no_source", f"{source[:80]!r} names no file")
    try:
        path = unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleRefused("image_bad_path", f"{source[:200]} is not UTF-8 when unquoted") from error
    if "\0" in path:
        raise SampleRefused("image_bad_path", f"{source[:200]} holds a zero byte")
    if SCHEME.match(path):  # an address that was hidden behind percent signs
        raise SampleRefused("image_remote", f"{source[:200]} is on the network")
    if path.startswith("/"):
        return path.lstrip("/")
    return f"{folder}/{path}" if folder else path
