"""A chat server on 127.0.0.1 that behaves as a test tells it, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "judge-120b"


class Request:
    """One POST. body: parsed JSON. number: how many came before. The methods are the ways of answering it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: dict, number: int):
        self.handler, self.body, self.number = handler, body, number
        self.headers, self.path = handler.headers, handler.path

    @property
    def asked(self) -> dict:
        """The JSON of the user's turn."""
        return json.loads(self.body["messages"][-1]["content"])

    def says(self, text: str, model: str = MODEL, finish: str = "stop") -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        self.sends(200, json.dumps({"id": "1", "model": model, "choices": [choice]}).encode())

    def sends(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(data)))
        self.handler.end_headers()
        self.handler.wfile.write(data)

    def drips(self, seconds: float, in_headers: bool) -> None:
        """One byte every 50 ms: no single read ever times out."""
        self.handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nX-Filler: " if in_headers else b"HTTP/1.1 200 OK\r\n\r\n"
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.handler.wfile.write(b" ")
            time.sleep(0.05)

    def floods(self, size: int) -> None:
        self.handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(size >> 16):
            self.handler.wfile.write(b" " * (1 << 16))


class LocalServer:
    """requests: every body that came, in order. busiest: how many were answered at the same time at most."""

    def __init__(self, answer: Callable[[Request], None]):
        self.requests: list[dict] = []
        self.busiest = self._busy = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer._busy += 1
                    outer.busiest = max(outer.busiest, outer._busy)
                try:
                    answer(Request(self, body, number))
                except OSError:
                    self.close_connection = True  # the client went away, which some tests are about
                finally:
                    with lock:
                        outer._busy -= 1

            def log_message(self, *parts: object) -> None:
                """Tests print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(answer: Callable[[Request], None]) -> Iterator[LocalServer]:
    server = LocalServer(answer)
    try:
        yield server
    finally:
        server.close()
