"""The append-only record of an iteration: every response and its verdict, so that a killed run repeats nothing.

``journal/iteration_000012/`` holds JSON-lines files, one pair per start of the run, written by rank 0. A line is
written in one piece and carries a checksum of itself; a line that a kill cut off, or that storage has spoilt, is as if
it had never been written: its response is drawn again, from the same seed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vl.generate.request import Request, Response
from megatron_vl.rl.rewards.verdict import Malformed, Ok, Verdict, VerifierError

Key = tuple[str, int]  # prompt id, sample index

RESPONSES, VERDICTS = "responses", "verdicts"


@dataclass(frozen=True)
class Found:
    """What the journal of an iteration holds. damaged: lines that were cut off or spoilt, counted."""

    responses: Mapping[Key, Response]
    verdicts: Mapping[Key, Verdict]
    damaged: int


class Journal:
    """The records of one iteration. A context manager: files are open until its end."""

    def __init__(self, folder: Path, iteration: int) -> None:
        self.folder = folder / iteration_name(iteration)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._name = (
            f"{uuid.uuid4().hex}.jsonl"  # a start of the run never writes behind a torn line of another
        )
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End writing."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def add_responses(self, responses: Sequence[Response]) -> None:
        """Append responses; on disk when this returns."""
        self._append(RESPONSES, [_response_record(response) for response in responses])

    def add_verdicts(self, verdicts: Sequence[tuple[Response, Verdict]]) -> None:
        """Append what verifiers said of responses; on disk when this returns."""
        self._append(VERDICTS, [{**_about(r), **_verdict_record(verdict)} for r, verdict in verdicts])

    def scan(self, weight_version: str, requests: Sequence[Request]) -> Found:
        """What earlier starts have left that still counts: responses to these requests, drawn by these weights.

        Of a response that is there twice the first counts, in the order of the file names. A verdict that an error
        of the verifier took the place of is asked for again.
        """
        seeds = {(r.prompt.prompt_id, r.sample_index): r.seed for r in requests}
        responses: dict[Key, Response] = {}
        verdicts: dict[Key, Verdict] = {}
        damaged = 0
        for record in self._records(RESPONSES):
            if record is None:
                damaged += 1
            elif _counts(record, weight_version, seeds):
                responses.setdefault(_key(record), _response(record))
        for record in self._records(VERDICTS):
            if record is None:
                damaged += 1
            elif (
                _counts(record, weight_version, seeds)
                and _key(record) in responses
                and record["verdict"] != "verifier_error"
            ):
                verdicts.setdefault(_key(record), _verdict(record))
        return Found(responses, verdicts, damaged)

    def _append(self, kind: str, records: Sequence[dict[str, Any]]) -> None:
        if not records:
            return
        if kind not in self._files:
            # Kept open over an iteration: opening is what costs on network file systems.
            self._files[kind] = (self.folder / f"{kind}-{self._name}").open("ab")
        file = self._files[kind]
        file.write(b"".join(map(_line, records)))
        file.flush()
        os.fsync(file.fileno())

    def _records(self, kind: str) -> Iterator[dict[str, Any] | None]:
        for path in sorted(self.folder.glob(f"{kind}-*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                yield _parse(line)


def iteration_name(iteration: int) -> str:
    """Folder of an iteration, stem of its other files."""
    return f"iteration_{iteration:06d}"


def retire(folder: Path, newest: int, keep: int) -> None:
    """Remove the records of iterations that no restart can need: all but the last ``keep`` up to ``newest``."""
    kept = {iteration_name(iteration) for iteration in range(newest - keep + 1, newest + 1)}
    for path in folder.glob("iteration_*"):
        if path.name not in kept and path.name < iteration_name(newest):
            shutil.rmtree(path)


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None when it is cut off or spoilt."""
    if not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    body = line[9:-1]
    if line[:8] != f"{zlib.crc32(body):08x}".encode():
        return None
    return json.loads(body)


def _key(record: Mapping[str, Any]) -> Key:
    return record["prompt"], record["sample"]


def _counts(record: Mapping[str, Any], version: str, seeds: Mapping[Key, int]) -> bool:
    return record["version"] == version and seeds.get(_key(record)) == record["seed"]


def _about(response: Response) -> dict[str, Any]:
    return {
        "prompt": response.prompt_id,
        "sample": response.sample_index,
        "seed": response.seed,
        "version": response.weight_version,
    }


def _response_record(response: Response) -> dict[str, Any]:
    return {
        **_about(response),
        "tokens": list(response.tokens),
        "logprobs": list(response.logprobs),
        "finish": response.finish_reason,
    }


def _response(record: Mapping[str, Any]) -> Response:
    return Response(
        record["prompt"],
        record["sample"],
        record["seed"],
        record["version"],
        tuple(record["tokens"]),
        tuple(record["logprobs"]),
        record["finish"],
    )


def _verdict_record(verdict: Verdict) -> dict[str, Any]:
    if isinstance(verdict, Ok):
        assert math.isfinite(verdict.score), verdict
        return {"verdict": "ok", "score": verdict.score, "parts": dict(verdict.parts)}
    kind = "malformed" if isinstance(verdict, Malformed) else "verifier_error"
    return {"verdict": kind, "reason": verdict.reason, "detail": verdict.detail}


def _verdict(record: Mapping[str, Any]) -> Verdict:
    if record["verdict"] == "ok":
        return Ok(record["score"], record["parts"])
    kind = Malformed if record["verdict"] == "malformed" else VerifierError
    return kind(record["reason"], record["detail"])
