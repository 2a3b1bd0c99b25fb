"""A client of a chat server with the interface of OpenAI's: one request, and every way in which it can fail.

Written on `http.client`, since nothing here needs more: requests of seconds do not gain from kept connections, and the
limits (one deadline for the whole of a request, bytes of the body, no redirect) are easier to hold than to configure.
Proxy variables of the environment are not read: the server is expected inside the cluster.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vl.errors import Problem, raise_if_any

_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_CHUNK = 65536


@dataclass(frozen=True)
class ServerSettings:
    """Where the server is and how long it is waited for.

    base_url: up to and including /v1. model: as the server names it in its answers; another one is refused.
    api_key_env: name of the environment variable with the key, empty for none. request_seconds: of one attempt, from
    connecting to the last byte. total_seconds: of all attempts of one request with the waits between, without waiting
    for one of `concurrency` places. max_tokens: of an answer. max_backoff_seconds and max_body_bytes are fixed in a
    run.
    """

    base_url: str
    model: str
    api_key_env: str = ""
    request_seconds: float = 120.0
    total_seconds: float = 600.0
    attempts: int = 4
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 30.0
    concurrency: int = 32
    max_body_bytes: int = 1 << 20
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        raise_if_any(self._problems())

    def _problems(self) -> list[Problem]:
        problems = []
        try:
            url = urllib.parse.urlsplit(self.base_url)
            fine = url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0)
            plain = (
                not (url.username or url.password or url.query or url.fragment)
                and self.base_url.isprintable()
            )
        except ValueError:
            fine = plain = False
        if not fine or not plain or " " in self.base_url:
            # The value is not shown: a key may stand in it.
            problems.append(
                Problem(
                    "rl.rewards.judge.base_url",
                    None,
                    "must be an http or https address without user, password, query or fragment",
                    "write e.g. http://judge:8000/v1; the key goes into the variable that api_key_env names",
                    show_value=False,
                )
            )
        if not self.model:
            problems.append(
                Problem(
                    "rl.rewards.judge.model",
                    self.model,
                    "must not be empty",
                    "ask the server: GET /v1/models",
                )
            )
        if self.api_key_env and not os.environ.get(self.api_key_env):
            remedy = "export it, or set api_key_env to '' for a server without keys"
            problems.append(
                Problem(
                    "rl.rewards.judge.api_key_env", self.api_key_env, "is a variable that is not set", remedy
                )
            )
        elif self.api_key_env and not _sendable(os.environ[self.api_key_env]):
            problems.append(
                Problem(
                    "rl.rewards.judge.api_key_env",
                    self.api_key_env,
                    "holds a line break or other characters that no header can",
                    "export it anew",
                )
            )
        for name in (
            "request_seconds",
            "total_seconds",
            "attempts",
            "concurrency",
            "max_body_bytes",
            "max_tokens",
        ):
            if not getattr(self, name) > 0:
                problems.append(
                    Problem(f"rl.rewards.judge.{name}", getattr(self, name), "must be above 0", "raise it")
                )
        return problems


class ChatFailure(Exception):
    """No usable answer. reason: short code under which it is counted. again: whether another attempt may help."""

    def __init__(self, reason: str, detail: str = "", again: bool = False, wait: float = 0.0):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.again, self.wait = reason, detail, again, wait


class ChatServer:
    """`complete` may be called from any number of threads; `concurrency` of them are served at a time."""

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self.url = urllib.parse.urlsplit(settings.base_url)
        self.requests = 0  # attempts made, for the log
        self._places = threading.BoundedSemaphore(settings.concurrency)

    def body(self, messages: Sequence[Mapping], temperature: float, seed: int) -> dict:
        """What is sent: the same for the same arguments, so that answers can be kept by it."""
        return {
            "model": self.settings.model,
            "messages": list(messages),
            "temperature": temperature,
            "seed": seed,
            "max_tokens": self.settings.max_tokens,
            "n": 1,
            "stream": False,
        }

    def complete(self, body: Mapping) -> str:
        """The text that the server answers. Raises ChatFailure after the last attempt."""
        settings = self.settings
        with self._places:
            deadline = time.monotonic() + settings.total_seconds
            for attempt in range(1, settings.attempts + 1):
                left = deadline - time.monotonic()
                try:
                    return self._attempt(body, min(settings.request_seconds, left))
                except ChatFailure as failure:
                    left = deadline - time.monotonic()
                    pause = min(settings.max_backoff_seconds, settings.backoff_seconds * 2 ** (attempt - 1))
                    # Spread, so that many clients of a server that comes back do not meet again.
                    pause = max(failure.wait, pause * random.uniform(0.5, 1.0))
                    if not failure.again or attempt == settings.attempts or pause >= left:
                        raise
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, body: Mapping, seconds: float) -> str:
        self.requests += 1
        status, headers, data = self._post(json.dumps(body).encode(), seconds)
        if 300 <= status < 400:
            raise ChatFailure("redirect", f"status {status}: redirects are not followed")
        if status != 200:
            waits = headers.get("Retry-After") or ""
            wait = float(waits) if waits.isascii() and waits.isdigit() and len(waits) < 6 else 0.0
            raise ChatFailure(f"http_{status}", data[:200].decode("ascii", "replace"), status in _AGAIN, wait)
        try:
            answer = json.loads(data)
            model, choice = answer["model"], answer["choices"][0]
            text, finish = choice["message"]["content"], choice["finish_reason"]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise ChatFailure("garbage", f"{type(error).__name__} in {data[:80]!r}", again=True) from error
        if model != self.settings.model:
            raise ChatFailure("wrong_model", f"{model!r:.100} answered, not {self.settings.model!r}")
        if finish != "stop" or not isinstance(text, str):
            raise ChatFailure("unfinished", f"finish_reason {finish!r:.50}")
        return text

    def _post(self, data: bytes, seconds: float) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body. A socket's own time-out starts anew with every byte, so a clock ends it all."""
        secure = self.url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        deadline = time.monotonic() + seconds
        connection = kind(self.url.hostname, self.url.port, timeout=seconds)
        clock = None
        try:
            connection.connect()
            clock = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, [connection.sock])
            clock.daemon = True
            clock.start()
            connection.request("POST", self.url.path.rstrip("/") + "/chat/completions", data, self._headers())
            response = connection.getresponse()
            received = b""
            while chunk := response.read(min(_CHUNK, self.settings.max_body_bytes + 1 - len(received))):
                received += chunk
                if len(received) > self.settings.max_body_bytes:
                    raise ChatFailure("too_large", f"a body above {self.settings.max_body_bytes} bytes")
            if time.monotonic() >= deadline:
                raise ChatFailure("timeout", f"no whole answer within {seconds:.1f} s", again=True)
            return response.status, response.headers, received
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
                raise ChatFailure("timeout", f"no whole answer within {seconds:.1f} s", again=True) from error
            raise ChatFailure(
                "no_connection", f"{type(error).__name__}: {error}"[:200], again=True
            ) from error
        finally:
            if clock:
                clock.cancel()
            connection.close()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.settings.api_key_env:
            headers["Authorization"] = f"Bearer {os.environ[self.settings.api_key_env]}"
        return headers


def _sendable(key: str) -> bool:
    return key.isascii() and key.isprintable()


def _shut(sock: socket.socket) -> None:
    """Ends reads and writes of another thread on this socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed in the meantime
