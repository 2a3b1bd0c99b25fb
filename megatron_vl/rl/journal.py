"""The append-only record of an iteration: every response and its verdict, so that a killed run repeats nothing.

``journal/iteration_000012/`` holds JSON-lines files, one pair per rank and start of the run. A line is written in one
piece and carries a checksum of itself; a line that a kill cut off, or that storage has spoilt, is as if it had never
been written: its response is drawn again, from the same seed. The files are also how a rank gets at the responses of
another: only an index (``Entry``) travels between ranks, not the tokens.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vl.errors import DataError
from megatron_vl.generate.request import Response
from megatron_vl.rl.rewards.verdict import Malformed, Ok, Verdict, VerifierError

Key = tuple[str, int]  # prompt id, sample index

RESPONSES, VERDICTS = "responses", "verdicts"


@dataclass(frozen=True)
class Entry:
    """Where a response lies. offset, size: bytes of its line. tokens: how many were sampled."""

    key: Key
    file: str
    offset: int
    size: int
    tokens: int
    finish_reason: str
    seed: int
    weight_version: str


@dataclass(frozen=True)
class Found:
    """What the journal of an iteration holds. damaged: lines that were cut off or spoilt, counted."""

    entries: Mapping[Key, Entry]
    verdicts: Mapping[Key, Verdict]
    damaged: int


class Journal:
    """The records of one iteration, written by one rank. start: tells the starts of a run apart, for file names."""

    def __init__(self, folder: Path, iteration: int, rank: int, start: str) -> None:
        self.folder = iteration_folder(folder, iteration)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._name = f"{start}-rank{rank:05d}.jsonl"
        self._files: dict[str, BinaryIO] = {}

    def add_response(self, response: Response) -> Entry:
        """Append a response; on disk when this returns."""
        record = {
            "key": [response.prompt_id, response.sample_index],
            "seed": response.seed,
            "version": response.weight_version,
            "tokens": list(response.tokens),
            "logprobs": list(response.logprobs),
            "finish": response.finish_reason,
        }
        offset, size = self._append(RESPONSES, record)
        return _entry(record, self._file_name(RESPONSES), offset, size)

    def add_verdict(self, key: Key, seed: int, weight_version: str, verdict: Verdict) -> None:
        """Append what a verifier said of the response with this key, seed and weight version."""
        record = {"key": list(key), "seed": seed, "version": weight_version, **_verdict_record(verdict)}
        self._append(VERDICTS, record)

    def load(self, entry: Entry) -> Response:
        """A response of any rank.

        Raises:
            DataError: the line is no longer what was written.
        """
        path = self.folder / entry.file
        with path.open("rb") as file:
            file.seek(entry.offset)
            record = _parse(file.read(entry.size))
        if record is None or tuple(record["key"]) != entry.key:
            raise DataError(
                f"{path}, byte {entry.offset}: the response of prompt {entry.key[0]}, sample {entry.key[1]}, is no "
                "longer there; the journal must not be changed while the run goes on"
            )
        return Response(
            entry.key[0],
            entry.key[1],
            record["seed"],
            record["version"],
            tuple(record["tokens"]),
            tuple(record["logprobs"]),
            record["finish"],
        )

    def scan(self, weight_version: str, seeds: Mapping[Key, int]) -> Found:
        """What earlier starts have left that still counts: responses wanted, of these weights and seeds.

        Of a response that is there twice the first counts, in the order of the file names.
        """
        entries: dict[Key, Entry] = {}
        damaged = 0
        for path, offset, size, record in self._records(RESPONSES):
            if record is None:
                damaged += 1
                continue
            entry = _entry(record, path.name, offset, size)
            if entry.weight_version == weight_version and seeds.get(entry.key) == entry.seed:
                entries.setdefault(entry.key, entry)
        verdicts: dict[Key, Verdict] = {}
        for _, _, _, record in self._records(VERDICTS):
            if record is None:
                damaged += 1
                continue
            key = (record["key"][0], record["key"][1])
            wanted = key in entries and (entries[key].seed, weight_version) == (
                record["seed"],
                record["version"],
            )
            if wanted and record["verdict"] != "verifier_error":  # those are asked again
                verdicts.setdefault(key, _verdict(record))
        return Found(entries, verdicts, damaged)

    def close(self) -> None:
        """End writing."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _file_name(self, kind: str) -> str:
        return f"{kind}-{self._name}"

    def _append(self, kind: str, record: dict[str, Any]) -> tuple[int, int]:
        if kind not in self._files:
            # Kept open over an iteration: opening is what costs on network file systems.
            self._files[kind] = (self.folder / self._file_name(kind)).open("ab")
        file = self._files[kind]
        line = _line(record)
        offset = file.tell()
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
        return offset, len(line)

    def _records(self, kind: str) -> Iterator[tuple[Path, int, int, dict[str, Any] | None]]:
        for path in sorted(self.folder.glob(f"{kind}-*.jsonl")):
            offset = 0
            for line in path.read_bytes().splitlines(keepends=True):
                yield path, offset, len(line), _parse(line)
                offset += len(line)


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where an iteration's records lie."""
    return folder / f"iteration_{iteration:06d}"


def old_iterations(names: Iterable[str], keep: int) -> list[str]:
    """Names of iteration folders that may go when the newest ``keep`` stay."""
    ours = sorted(name for name in names if name.startswith("iteration_"))
    return ours[: max(len(ours) - keep, 0)]


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


def _entry(record: Mapping[str, Any], file: str, offset: int, size: int) -> Entry:
    key = (record["key"][0], record["key"][1])
    return Entry(
        key, file, offset, size, len(record["tokens"]), record["finish"], record["seed"], record["version"]
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
