"""The state folder of a curation run: which pieces of work are done, and for which data and rules.

A piece of work is a chunk of consecutive lines of one source. Its files appear under their names only when
they are complete, so a run that is killed continues with what is missing.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vl import __version__
from megatron_vl.config.dump import to_mapping
from megatron_vl.data.curate.benchmarks import list_files
from megatron_vl.data.curate.outcome import Outcome, from_lines, to_lines
from megatron_vl.data.curate.rules import CurationConfig
from megatron_vl.data.jsonl import JsonlSource, RawLine
from megatron_vl.errors import DataError

FORMAT = 1
REPORT = "report.json"
OUTPUTS = (REPORT, "dropped.jsonl", "removed_images.jsonl", "kept", "mosaic")
_STAGES = ("examined", "written", "benchmarks")


@dataclass(frozen=True)
class Chunk:
    """Lines of one source. number: of the chunk. first: number of its first sample over all sources.

    first_in_source: the same, counted within the source. source: number of the source.
    """

    number: int
    source: int
    first: int
    first_in_source: int
    count: int


def plan_chunks(lengths: Sequence[int], size: int) -> list[Chunk]:
    """Chunks of at most `size` samples that do not cross sources. lengths: samples of each source."""
    chunks, first = [], 0
    for source, length in enumerate(lengths):
        for start in range(0, length, size):
            count = min(size, length - start)
            chunks.append(Chunk(len(chunks), source, first + start, start, count))
        first += length
    return chunks


def read_lines(source: JsonlSource, chunk: Chunk) -> list[RawLine]:
    return [source[number] for number in range(chunk.first_in_source, chunk.first_in_source + chunk.count)]


def fingerprint(config: CurationConfig, sources: Sequence[JsonlSource]) -> dict[str, Any]:
    """What must not change before a run is resumed: rules, files with size and time, version of the code."""
    rules = {name: value for name, value in to_mapping(config).items() if name != "output"}
    balance, decontamination = config.concept_balance, config.decontamination
    arrays = [balance.ids, balance.embeddings, balance.cluster_ids] if balance.enabled else []
    benchmarks = []
    if decontamination.enabled:
        root = decontamination.benchmarks
        benchmarks = [os.path.join(root, name) for name in list_files(root)]
    return {
        "format": FORMAT,
        "version": __version__,
        "rules": rules,
        "data": [_stamp(path) for source in sources for path in source.paths],
        "arrays": [_stamp(path) for path in arrays if path],
        "benchmarks": [_stamp(path) for path in benchmarks],
    }


class State:
    """Files below `<output>/state`. Held by one process at a time, which the operating system looks after."""

    def __init__(self, output: str):
        self.output = output
        self.folder = os.path.join(output, "state")
        os.makedirs(self.folder, exist_ok=True)
        # The lock goes with the process, however it ends.
        self._lock = open(os.path.join(self.folder, "lock"), "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise DataError(
                f"{output}: another curation run is at work there; wait for it, or end it"
            ) from error

    def begin(self, current: dict[str, Any]) -> bool:
        """Checks that earlier work is of the same run, and says whether that run is finished.

        Raises DataError when rules, data or code have changed since.
        """
        path = os.path.join(self.folder, "run.json")
        current = json.loads(json.dumps(current))
        if not os.path.exists(path):
            strange = [name for name in OUTPUTS if os.path.exists(os.path.join(self.output, name))]
            if strange:
                raise DataError(
                    f"{self.output}: holds {', '.join(strange)}, but no state of a curation run; choose an empty folder"
                )
            write_atomically(path, json.dumps(current, indent=1).encode())
            return False
        with open(path, encoding="utf-8") as file:
            earlier = json.load(file)
        changed = [name for name in current if earlier.get(name) != current[name]]
        if "rules" in changed:
            rules = earlier.get("rules", {})
            changed += [
                f"rules.{name}" for name, value in current["rules"].items() if rules.get(name) != value
            ]
        if changed:
            raise DataError(
                f"{self.output}: begun with other {', '.join(changed)}; use another output folder, or --restart to "
                "throw the earlier work away"
            )
        return os.path.exists(os.path.join(self.output, REPORT))

    def restart(self) -> None:
        """Removes what an earlier run has left here, and nothing where there was none."""
        run = os.path.join(self.folder, "run.json")
        if not os.path.exists(run):
            return
        for path in [os.path.join(self.output, name) for name in OUTPUTS] + [
            os.path.join(self.folder, stage) for stage in _STAGES
        ]:
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                os.remove(path)
        os.remove(run)  # last: a restart that is interrupted can be given again

    def path(self, stage: str, chunk: int, kind: str) -> str:
        """File of a chunk, e.g. `state/examined/00000012.outcomes`."""
        return os.path.join(self.folder, stage, f"{chunk:08d}.{kind}")

    def done(self, stage: str, kind: str) -> set[int]:
        """Numbers of the chunks of a stage that are complete; `kind` is the file that is written last."""
        os.makedirs(os.path.join(self.folder, stage), exist_ok=True)
        found = glob.glob(os.path.join(glob.escape(os.path.join(self.folder, stage)), f"*.{kind}"))
        return {int(os.path.basename(path).split(".")[0]) for path in found}

    def open_mosaics(self, wanted: bool) -> None:
        """Makes the folder of mosaics, or clears it of what a killed process left half written."""
        folder = os.path.join(self.output, "mosaic")
        if wanted:
            os.makedirs(folder, exist_ok=True)
            for path in glob.glob(os.path.join(glob.escape(folder), "*.tmp")):
                os.remove(path)

    def finish(self, report: bytes) -> None:
        """Writes the report, which marks the run as finished, and removes what was only on the way."""
        write_atomically(os.path.join(self.output, REPORT), report)
        for stage in _STAGES:
            shutil.rmtree(os.path.join(self.folder, stage), ignore_errors=True)

    def close(self) -> None:
        self._lock.close()


def store_outcomes(path: str, outcomes: Iterable[Outcome]) -> None:
    write_atomically(path, b"".join(to_lines(outcomes)))


def load_outcomes(path: str) -> Iterator[Outcome]:
    with open(path, "rb") as file:
        yield from from_lines(file)


def write_atomically(path: str, data: bytes) -> None:
    """The file is there as a whole or not at all. The temporary name is that of the process."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def join_files(target: str, parts: Iterable[str]) -> dict[str, Any]:
    """Puts files one after the other under `target`. Returns lines and SHA-256 of the result."""
    digest, lines = hashlib.sha256(), 0
    temporary = target + ".tmp"
    with open(temporary, "wb") as out:
        for part in parts:
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    out.write(block)
                    digest.update(block)
                    lines += block.count(b"\n")
    os.replace(temporary, target)
    return {"lines": lines, "sha256": digest.hexdigest()}


def _stamp(path: str) -> dict[str, Any]:
    status = os.stat(path)
    return {"path": path, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
