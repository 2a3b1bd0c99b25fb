"""An HTML page of sampled rollouts: image, prompt, response, reward, advantage. One file, nothing to fetch."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

THUMBNAIL = 224  # pixels of the longer side
SHOWN_CHARACTERS = 4000

STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;margin:24px;color:#222;max-width:1100px}"
    "table{border-collapse:collapse;width:100%;margin:6px 0 28px}"
    "td,th{border:1px solid #ddd;padding:6px 8px;text-align:left;vertical-align:top}"
    "pre{white-space:pre-wrap;margin:0;font:13px/1.4 ui-monospace,monospace}"
    "img{border:1px solid #ccc;margin-right:8px}.good{background:#e8f5e9}.bad{background:#fdecea}"
    ".masked{background:#eee;color:#666}.small{color:#666;font-size:12px}"
)


@dataclass(frozen=True)
class ShownResponse:
    """One line of a prompt's table. advantage: mean over the tokens, None when it was not trained on."""

    text: str
    tokens: int
    finish_reason: str
    reward: float
    masked: bool
    advantage: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt with its responses. images: pictures as Pillow read them."""

    prompt_id: str
    source: str
    text: str
    answer: str
    images: Sequence[Image.Image]
    responses: Sequence[ShownResponse]


def rollout_page(title: str, prompts: Sequence[ShownPrompt]) -> str:
    """The page. Everything that comes from data or model is escaped."""
    body = "".join(_prompt(prompt) for prompt in prompts)
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return (
        f"<!doctype html><html><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def _prompt(prompt: ShownPrompt) -> str:
    images = "".join(f"<img alt='' src='{data_uri(image)}'>" for image in prompt.images)
    rows = "".join(_row(response) for response in prompt.responses)
    source = f" <span class='small'>{html.escape(prompt.source)}</span>" if prompt.source else ""
    return (
        f"<h2>{html.escape(prompt.prompt_id)}{source}</h2><p>{images}</p><pre>{_text(prompt.text)}</pre>"
        f"<p>Reference: <b>{html.escape(prompt.answer)}</b></p>"
        "<table><tr><th>response</th><th>reward</th><th>advantage</th><th>tokens</th><th>end</th></tr>"
        f"{rows}</table>"
    )


def _row(response: ShownResponse) -> str:
    kind = "masked" if response.masked else "good" if response.reward >= 1.0 else "bad"
    parts = ", ".join(f"{html.escape(name)} {value:.3g}" for name, value in response.parts.items())
    note = html.escape(response.note)
    small = (
        f"<br><span class='small'>{'; '.join(x for x in (parts, note) if x)}</span>" if parts or note else ""
    )
    reward = "masked" if response.masked else f"{response.reward:.3f}"
    advantage = "" if response.advantage is None else f"{response.advantage:+.3f}"
    return (
        f"<tr class='{kind}'><td><pre>{_text(response.text)}</pre></td><td>{reward}{small}</td>"
        f"<td>{advantage}</td><td>{response.tokens}</td><td>{html.escape(response.finish_reason)}</td></tr>"
    )


def _text(text: str) -> str:
    """Escaped, the middle of a very long one left out and counted."""
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out > 0:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"
    return html.escape(text)


def data_uri(image: Image.Image) -> str:
    """A small JPEG of the picture as a data URI."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
