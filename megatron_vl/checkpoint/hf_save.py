"""Weights into a folder in the released layout: ``model-0000N.safetensors``, their index, block by block."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.checkpoint.digests import Digests
from megatron_vl.checkpoint.hf_load import INDEX
from megatron_vl.checkpoint.safetensors_file import ShardWriter, TensorSpec, header_of
from megatron_vl.checkpoint.weights import Weight
from megatron_vl.errors import CheckpointError

IN_FLIGHT_BYTES = 3 << 30


@dataclass(frozen=True)
class Shard:
    """One file and its tensors in order."""

    file: str
    names: tuple[str, ...]


def plan_shards(specs: Sequence[TensorSpec], limit: int) -> list[Shard]:
    """Fill files of at most ``limit`` bytes, header included, in the order of names, as the release does.

    A tensor that is larger than the limit gets a file of its own.
    """
    groups: list[list[TensorSpec]] = []
    size = 0
    for spec in sorted(specs, key=lambda s: s.name):
        room = spec.nbytes + len(header_of([spec]))
        if not groups or size + room > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += room
    return [
        Shard(f"model-{number + 1:05d}.safetensors", tuple(spec.name for spec in group))
        for number, group in enumerate(groups)
    ]


def index_of(shards: Sequence[Shard], specs: Mapping[str, TensorSpec]) -> str:
    """The text of ``model.safetensors.index.json``."""
    files = {name: shard.file for shard in shards for name in shard.names}
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
        "weight_map": dict(sorted(files.items())),
    }
    return json.dumps(index, indent=2) + "\n"


class Gate:
    """Lets threads in as long as what they hold together stays below a limit; one is always let in."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Wait until there is room for so many bytes, and take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + nbytes <= self._limit)
            self._held += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()


def write_shards(
    folder: Path,
    weights: Mapping[str, Weight],
    shards: Sequence[Shard],
    threads: int,
    on_bytes: Callable[[int], None],
    after_shard: Callable[[Shard, Digests], None],
    known: Mapping[str, str] | None = None,
) -> Digests:
    """Write and fsync the files one after the other, the tensors of each by ``threads`` threads; then the index.

    on_bytes: called with what was written, from any thread. after_shard: called when a file is on the disk.
    known: sha256 that tensors must have (checkpoint/digests.py). Returns the digests of what was written.

    Raises:
        CheckpointError: a source that cannot be read, or is not what its digest says. OSError: writing failed.
    """
    digests, gate, stop = Digests(), Gate(IN_FLIGHT_BYTES), threading.Event()

    def move(name: str, writer: ShardWriter) -> None:
        weight = weights[name]
        row = weight.spec.nbytes // max(weight.spec.shape[0], 1)
        with gate.holding(weight.held):
            for first, count in weight.blocks():
                if stop.is_set():
                    return
                values = weight.rows(first, count)
                digests.add(weight.spec, first, values)
                writer.write(name, first * row, values)
                on_bytes(values.nbytes)
                del values
        if known is not None and name in known and digests.of(name) != known[name]:
            raise CheckpointError(
                f"{name}: its values are not those of the digest that was stored with it; the source is damaged: "
                "import it again"
            )

    with ThreadPoolExecutor(max_workers=threads) as pool:
        for shard in shards:
            writer = ShardWriter(folder / shard.file, [weights[name].spec for name in shard.names])
            jobs: list[Future] = []
            try:
                jobs += [pool.submit(move, name, writer) for name in shard.names]
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                _raise_first(jobs, done, stop)
                writer.sync()
            except BaseException:
                stop.set()  # also the jobs that an interrupt left out of the list: the pool waits for all
                raise
            finally:
                for job in jobs:
                    job.cancel()
                wait(jobs)
                writer.close()
            after_shard(shard, digests)
    specs = {name: weights[name].spec for shard in shards for name in shard.names}
    (folder / INDEX).write_text(index_of(shards, specs), encoding="utf-8")
    return digests


def _raise_first(jobs: list[Future], done: set[Future], stop: threading.Event) -> None:
    """Raise what the first failed job raised, after the others have stopped."""
    failed = next((job for job in jobs if job in done and job.exception() is not None), None)
    if failed is not None:
        stop.set()
        failed.result()
