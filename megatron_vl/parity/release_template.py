"""The chat template of a release against data/template.py: the same text for the same conversation?

A template is a program out of a downloaded file. It is run in jinja2's sandbox, without access to files,
modules or private attributes, as transformers does. jinja2 is no dependency of this package (torch happens to
bring it); this one check needs it and says so when it is missing.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.checkpoint.release import OK, SKIPPED, Check, Expected
from megatron_vl.data.crops import CropPlan
from megatron_vl.data.sample import ImagePart, Message, Sample, TextPart
from megatron_vl.data.special_tokens import LITERALS
from megatron_vl.data.template import Template
from megatron_vl.data.tokenizer import HuggingFaceTokenizer, TextTokenizer, check_tokenizer
from megatron_vl.errors import DataError

NAME = "template"
FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
TEMPLATE_SAYS_NO = "the template refuses the conversation"

# Role and parts of every turn; None stands for an image.
CONVERSATIONS: dict[str, tuple[tuple[str, tuple[str | None, ...]], ...]] = {
    "one turn": (("user", ("How many?",)), ("assistant", ("Three.",))),
    "system turn": (("system", ("Be brief.",)), ("user", ("How many?",)), ("assistant", ("Three.",))),
    "image first": (("user", (None, "What is this?")), ("assistant", ("A cup.",))),
    "image between": (("user", ("Look: ", None, " What is this?")), ("assistant", ("A cup.",))),
    "two images": (("user", (None, None, "Which is larger?")), ("assistant", ("The second.",))),
    "two turns": (
        ("user", (None, "What is this?")),
        ("assistant", ("A cup.",)),
        ("user", ("Which colour?",)),
        ("assistant", ("Red.",)),
    ),
    "thoughts": (("user", ("2 + 2?",)), ("assistant", ("<think>\nTwo and two.\n</think>\n\n4",))),
    "spaces": (("user", ("  How many?\n",)), ("assistant", (" Three. \n",))),
}


def check_template(directory: Path, expected: Expected, tokenizer: Path | None = None) -> Check:
    """Renders every conversation both ways and shows a diff; with a tokenizer.json the ids are compared too.

    tokenizer: None = the directory's tokenizer.json, if it has one.
    """
    try:
        import jinja2  # noqa: F401
    except ModuleNotFoundError:
        return Check(NAME, SKIPPED, "jinja2 is not installed: pip install jinja2")
    try:
        source = template_source(directory)
    except DataError as error:
        return Check.of(NAME, "the chat template", [str(error)])
    if source is None:
        return Check(NAME, SKIPPED, f"no chat template in {', '.join(FILES)}")
    file, text = source
    try:
        render = compile_template(text)
    except DataError as error:
        return Check.of(NAME, file, [str(error)])
    differences = [
        line
        for name in CONVERSATIONS
        for line in _difference(name, render(_messages(name), False), plain_text(name, expected))
    ]
    asked = render(_messages("one turn")[:1], True).removeprefix(render(_messages("one turn")[:1], False))
    notes = [f"the template asks for an answer with {asked!r}"]
    check = Check.of(NAME, f"text of {len(CONVERSATIONS)} conversations by {file}", differences, notes)
    path = tokenizer or directory / "tokenizer.json"
    if check.status == OK and path.is_file():
        check = _compare_ids(check, path, expected, render)
    elif check.status == OK:
        check.notes.append(
            "no tokenizer.json: ids were not compared (make one with AutoTokenizer.save_pretrained)"
        )
    return check


def template_source(directory: Path) -> tuple[str, str] | None:
    """(file name, template text) from the first file that has one.

    Raises:
        DataError: a file that is not UTF-8 text, or not JSON where it should be.
    """
    for name in FILES:
        path = directory / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            found: Any = text if name.endswith(".jinja") else json.loads(text).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}: cannot be read as a template ({error})") from error
        if isinstance(found, list):  # several by name: [{"name": "default", "template": ...}, ...]
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        if isinstance(found, str):
            return name, found
    return None


def compile_template(text: str) -> Callable[[list[dict[str, Any]], bool], str]:
    """`render(messages, add_generation_prompt)` in the sandbox, with the functions that transformers offers.

    A template that fails while it renders gives its error as text, so that it shows in the diff.

    Raises:
        DataError: not a template.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # the default filter escapes HTML characters
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: "2026-01-01"
    try:
        template = environment.from_string(text)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template is not jinja2 ({error})") from error

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a foreign program may fail in any way
            return f"{TEMPLATE_SAYS_NO}: {type(error).__name__}: {error}"

    return render


def plain_text(conversation: str, expected: Expected) -> str:
    """What data/template.py writes, with one `<im_patch>` per image as before the expansion."""
    template = Template(_Characters(), expected.model.tokens, expected.model.vision, "all_text")
    return template.tokenizer.decode(_ids(template, conversation), expected.model.tokens)


def _messages(conversation: str) -> list[dict[str, Any]]:
    """The conversation as templates take it; a turn of text only has a plain string."""
    messages: list[dict[str, Any]] = []
    for role, parts in CONVERSATIONS[conversation]:
        listed = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        messages.append({"role": role, "content": listed if None in parts else "".join(filter(None, parts))})
    return messages


def _ids(template: Template, conversation: str) -> list[int]:
    """ids by data/template.py, each image collapsed to one <im_patch>."""
    turns = tuple(
        Message(role, tuple(ImagePart("") if part is None else TextPart(part) for part in parts))
        for role, parts in CONVERSATIONS[conversation]
    )
    sample = Sample(conversation, messages=turns)
    small = CropPlan((8, 8), (8, 8), (8, 8), 0, None, rows=0, cols=0)
    ids, _ = template.render(sample, [small] * len(sample.images))
    tokens = template.tokens
    inside = np.isin(ids, [tokens.im_start, tokens.im_patch])
    # of `<im_start> <im_patch> ... <im_end>` the last id stands for the whole
    return [tokens.im_patch if number == tokens.im_end else int(number) for number in ids[~inside]]


def _difference(name: str, release: str, ours: str) -> list[str]:
    """A diff of two texts, line breaks shown."""
    if release == ours:
        return []
    lines = [[repr(line) for line in text.splitlines(keepends=True)] for text in (release, ours)]
    shown = difflib.unified_diff(*lines, "release", "data/template.py", lineterm="")
    return ["\n".join([f"{name}:", *(f"    {line}" for line in shown)])]


def _compare_ids(check: Check, path: Path, expected: Expected, render: Callable[..., str]) -> Check:
    """The ids of the release's text, special tokens recognised in it, against ours."""
    import tokenizers

    tokens = expected.model.tokens
    try:
        ours = HuggingFaceTokenizer(str(path))
        check_tokenizer(ours, tokens, expected.model.text.vocab_size)
    except DataError as error:
        return Check.of(NAME, check.summary, [str(error)], check.notes)
    release = tokenizers.Tokenizer.from_file(str(path))
    template = Template(ours, tokens, expected.model.vision, "all_text")
    found = []
    for name in CONVERSATIONS:
        theirs = release.encode(render(_messages(name), False), add_special_tokens=False).ids
        mine = _ids(template, name)
        if theirs != mine:
            at = next(
                (n for n, pair in enumerate(zip(theirs, mine)) if pair[0] != pair[1]),
                min(len(theirs), len(mine)),
            )
            found.append(
                f"{name}: ids differ from number {at} on: {theirs[at : at + 8]}, ours {mine[at : at + 8]}"
            )
    return Check.of(NAME, f"{check.summary}, and their ids by {path.name}", found, check.notes)


class _Characters(TextTokenizer):
    """One id per character, beyond every vocabulary: shows the text that the template writes."""

    FIRST = 1 << 32

    def __init__(self) -> None:
        super().__init__("")

    def encode(self, text: str) -> list[int]:
        return [self.FIRST + ord(character) for character in text]

    def decode_text(self, ids: Sequence[int]) -> str:
        return "".join(chr(number - self.FIRST) for number in ids)

    def text_pieces(self) -> dict[int, str]:
        return {}

    def id_of(self, piece: str) -> int | None:
        return None if piece in LITERALS.values() else self.FIRST + ord(piece[0])

    def knows(self, token_id: int) -> bool:
        return token_id >= self.FIRST
