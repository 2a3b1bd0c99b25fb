"""Responses on the console: the first one as it is drawn, the others when all are done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from megatron_vl.generate.request import Response

UNFINISHED = "\ufffd"  # how a tokenizer shows a character of which bytes are still missing


class Screen:
    """text: ids -> text. Answers go to standard output, what is about them to standard error."""

    def __init__(self, text: Callable[[Sequence[int]], str], stop_ids: Sequence[int]) -> None:
        self.text, self.stop_ids = text, frozenset(stop_ids)
        self.began = time.perf_counter()
        self._ids: list[int] = []
        self._shown = 0

    def show(self, index: int, token: int) -> None:
        """A token of request ``index`` has been drawn; the first request's are printed as soon as they are readable."""
        if index != 0 or token in self.stop_ids:
            return
        self._ids.append(token)
        text = self.text(self._ids)
        if not text.endswith(UNFINISHED):
            self._print(text)

    def finish(self, responses: Sequence[Response]) -> None:
        """Print what is left, then how the responses ended."""
        seconds = time.perf_counter() - self.began
        for number, response in enumerate(responses):
            whole = self.text([token for token in response.tokens if token not in self.stop_ids])
            if number == 0:
                self._print(whole)
                print(flush=True)
            else:
                print(f"--- response {number + 1}, seed {response.seed}", file=sys.stderr, flush=True)
                print(whole, flush=True)
        count = sum(len(response.tokens) for response in responses)
        ends = ", ".join(response.finish_reason for response in responses)
        print(
            f"{count} tokens in {seconds:.1f} s; ended by: {ends}; weights {responses[0].weight_version}",
            file=sys.stderr,
            flush=True,
        )

    def _print(self, text: str) -> None:
        print(text[self._shown :], end="", flush=True)
        self._shown = len(text)
