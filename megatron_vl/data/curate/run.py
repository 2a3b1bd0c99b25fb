"""A curation run: rules about single samples, decisions over all of them, files, report.

Passes one and three work on chunks in parallel processes and store every finished chunk; pass two is quick,
needs everything at once, and is simply done again when a run is resumed. The bytes of all outputs depend on
the data and the description only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_vl.data.curate.benchmarks import BenchmarkFolder, read_benchmarks
from megatron_vl.data.curate.decide import Decisions, Gathered, decide
from megatron_vl.data.curate.decontaminate import BenchmarkIndex, build_index
from megatron_vl.data.curate.examine import BenchmarkImages, Examiner
from megatron_vl.data.curate.outcome import Outcome
from megatron_vl.data.curate.perceptual_hash import perceptual_hash
from megatron_vl.data.curate.pool import Workers
from megatron_vl.data.curate.progress import Progress
from megatron_vl.data.curate.report import Counts, add_counts, make_report, to_json
from megatron_vl.data.curate.rules import CurationConfig
from megatron_vl.data.curate.state import (
    Chunk,
    State,
    fingerprint,
    join_files,
    load_outcomes,
    plan_chunks,
    read_lines,
    store_outcomes,
)
from megatron_vl.data.curate.write import ChunkDecisions, store_chunk, write_chunk
from megatron_vl.data.decode import DecodeRule, load_rgb
from megatron_vl.data.image_checks import resolve_under
from megatron_vl.data.jsonl import JsonlSource, RawLine
from megatron_vl.errors import DataError, ImageRefused

EXAMINED, WRITTEN = "examined", "written"
_FILES = ("kept", "dropped", "removed", "counts")
_FEW = 20  # names that a report lists as examples


@dataclass(frozen=True)
class _Task:
    """A chunk with its lines. decisions: for the third pass."""

    chunk: Chunk
    source_name: str
    lines: list[RawLine]
    decisions: ChunkDecisions | None = None


@dataclass(frozen=True)
class _Setup:
    """What a worker process needs to start."""

    config: CurationConfig
    state_folder: str
    benchmark_folder: str | None
    benchmark_images: BenchmarkImages | None

    def path(self, stage: str, chunk: int, kind: str) -> str:
        return os.path.join(self.state_folder, stage, f"{chunk:08d}.{kind}")


def curate(
    config: CurationConfig, workers: int = 1, restart: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs a description to its end, or continues it, and returns the report.

    say: takes the lines of the console. Raises DataError for unusable inputs; nothing that is wrong with a
    single sample ends a run.
    """
    sources = [JsonlSource(source.files) for source in config.sources]
    state = State(config.output)
    try:
        if restart:
            state.restart()
        if state.begin(fingerprint(config, sources)):
            say(f"{config.output}: this run is finished; this is its report. --restart does it again")
            with open(os.path.join(config.output, "report.json"), encoding="utf-8") as file:
                return json.load(file)
        setup, facts = _prepare(config, state)
        chunks = plan_chunks([len(source) for source in sources], config.chunk_samples)
        with Workers(min(workers, len(chunks)), _start_worker, (setup,)) as pool:
            work = _Work(config, sources, chunks, state, pool)
            work.run(_examine_chunk, "rules", (EXAMINED, "outcomes"), {})
            decisions, by_chunk = _decide(config, state, chunks)
            state.open_mosaics(config.mosaic.enabled)
            work.run(_write_chunk, "writing", (WRITTEN, "counts"), by_chunk)
        return _finish(config, state, chunks, {**facts, **decisions.facts})
    finally:
        state.close()
        for source in sources:
            source.close()


@dataclass(frozen=True)
class _Work:
    """All chunks of a run and who does them."""

    config: CurationConfig
    sources: Sequence[JsonlSource]
    chunks: Sequence[Chunk]
    state: State
    pool: Workers

    def run(
        self,
        function: Callable[[_Task], int],
        label: str,
        stage: tuple[str, str],
        decisions: dict[int, ChunkDecisions],
    ) -> None:
        """Does the chunks of a stage that are not done yet. stage: its folder, and the file written last."""
        done = self.state.done(*stage)
        left = [chunk for chunk in self.chunks if chunk.number not in done]
        total = sum(chunk.count for chunk in self.chunks)
        progress = Progress(label, total, total - sum(chunk.count for chunk in left))

        def tasks() -> Iterator[_Task]:
            for chunk in left:
                lines = read_lines(self.sources[chunk.source], chunk)
                name = self.config.sources[chunk.source].name
                yield _Task(chunk, name, lines, decisions.get(chunk.number, ChunkDecisions()))

        for count in self.pool.run(function, tasks()):
            progress.add(count)


_worker: list[Any] = []  # the setup and the examiner of this process


def _start_worker(setup: _Setup) -> None:
    torch.set_num_threads(1)
    index = BenchmarkIndex.load(setup.benchmark_folder) if setup.benchmark_folder else None
    _worker[:] = [setup, Examiner(setup.config, index, setup.benchmark_images)]


def _examine_chunk(task: _Task) -> int:
    setup, examiner = _worker
    first = task.chunk.first_in_source
    outcomes = [
        examiner.examine(raw, task.source_name, first + place) for place, raw in enumerate(task.lines)
    ]
    store_outcomes(setup.path(EXAMINED, task.chunk.number, "outcomes"), outcomes)
    return len(outcomes)


def _write_chunk(task: _Task) -> int:
    setup, _ = _worker
    outcomes: list[Outcome] = list(load_outcomes(setup.path(EXAMINED, task.chunk.number, "outcomes")))
    assert task.decisions is not None
    files = write_chunk(
        setup.config, task.lines, outcomes, task.decisions, task.source_name, task.chunk.first_in_source
    )
    store_chunk(files, {kind: setup.path(WRITTEN, task.chunk.number, kind) for kind in _FILES})
    return len(outcomes)


def _prepare(config: CurationConfig, state: State) -> tuple[_Setup, dict[str, Any]]:
    """Indexes the benchmarks once, for all processes."""
    rule = config.decontamination
    if not rule.enabled:
        setup = _Setup(config, state.folder, None, None)
        Examiner(config)  # what a rule needs and does not find is said here, not in a worker
        return setup, {}
    folder = read_benchmarks(rule.benchmarks, rule.fields, rule.images)
    index, counts = build_index(folder.items, rule.ngram, rule.exact_min_words)
    place = os.path.join(state.folder, "benchmarks")
    index.save(place)
    facts: dict[str, Any] = {**counts, "windows": len(index.gram_hashes), "images": len(folder.images)}
    images = None
    if rule.images:
        images, unused = _hash_benchmark_images(folder, config.failed_images.max_image_pixels)
        facts |= {"images_without_hash": len(unused), "examples_without_hash": unused[:_FEW]}
    facts["records_without_prompt"] = sum(folder.without_text.values())
    facts["files_not_read"] = dict(sorted(folder.unused.items()))
    short = np.flatnonzero(np.diff(index.offsets) < rule.ngram)
    facts["examples_too_short_for_ngram"] = [index.names[item] for item in short[:_FEW]]
    Examiner(config, index, images)
    return _Setup(config, state.folder, place, images), {"decontamination": facts}


def _hash_benchmark_images(folder: BenchmarkFolder, max_pixels: int) -> tuple[BenchmarkImages, list[str]]:
    """Hashes of the images, and those that cannot be read or are too flat."""
    hashes, names, unused = [], [], []
    for name in folder.images:
        try:
            value = perceptual_hash(
                load_rgb(resolve_under(folder.root, name), DecodeRule(max_pixels=max_pixels))
            )
        except ImageRefused as refusal:
            unused.append(f"{name}: {refusal.reason}")
            continue
        if value is None:
            unused.append(f"{name}: too flat")
        else:
            hashes.append(value)
            names.append(name)
    return BenchmarkImages(np.array(hashes, dtype=np.uint64), names), unused


def _decide(
    config: CurationConfig, state: State, chunks: Sequence[Chunk]
) -> tuple[Decisions, dict[int, ChunkDecisions]]:
    """The second pass, and its decisions sorted by chunk."""
    if not (config.near_duplicates.enabled or config.concept_balance.enabled or config.mosaic.enabled):
        return Decisions(), {}
    gathered = Gathered()
    chunk_of: list[tuple[int, int]] = []
    for chunk in chunks:
        outcomes = list(load_outcomes(state.path(EXAMINED, chunk.number, "outcomes")))
        if len(outcomes) != chunk.count:
            raise DataError(f"{state.folder}: chunk {chunk.number} is not whole; run again with --restart")
        for place, outcome in enumerate(outcomes):
            gathered.add(chunk.first + place, chunk.source, outcome)
        chunk_of += [(chunk.number, chunk.first)] * chunk.count
    decisions = decide(config, gathered)
    by_chunk: dict[int, ChunkDecisions] = {}

    def place_of(number: int) -> tuple[ChunkDecisions, int]:
        chunk, first = chunk_of[number]
        return by_chunk.setdefault(chunk, ChunkDecisions()), number - first

    ids = dict(zip(gathered.numbers, gathered.ids))
    for number, finding in decisions.dropped.items():
        own, place = place_of(number)
        own.dropped[place] = finding
    for group in decisions.mosaics:
        own, place = place_of(group[0])
        own.mosaics[place] = [(ids[number], gathered.pairs[number]) for number in group]
        if not config.mosaic.keep_originals:
            for number in group:
                own, place = place_of(number)
                own.merged.add(place)
    return decisions, by_chunk


def _finish(
    config: CurationConfig, state: State, chunks: Sequence[Chunk], facts: dict[str, Any]
) -> dict[str, Any]:
    """Joins the files of the chunks in input order, and writes the report."""
    by_source: dict[str, Counts] = {source.name: {} for source in config.sources}
    for chunk in chunks:
        with open(state.path(WRITTEN, chunk.number, "counts"), encoding="utf-8") as file:
            add_counts(by_source[config.sources[chunk.source].name], json.load(file))
    os.makedirs(os.path.join(config.output, "kept"), exist_ok=True)
    outputs = {}
    for number, source in enumerate(config.sources):
        parts = [state.path(WRITTEN, chunk.number, "kept") for chunk in chunks if chunk.source == number]
        name = f"kept/{source.name}.jsonl"
        outputs[name] = join_files(os.path.join(config.output, name), parts)
    for name, kind in (("dropped.jsonl", "dropped"), ("removed_images.jsonl", "removed")):
        parts = [state.path(WRITTEN, chunk.number, kind) for chunk in chunks]
        outputs[name] = join_files(os.path.join(config.output, name), parts)
    report = make_report(config, by_source, facts, outputs)
    written, total = outputs["dropped.jsonl"]["lines"], sum(report["total"]["dropped"].values())
    assert written == total, f"{written} dropped samples written, {total} counted"
    state.finish(to_json(report))
    return report
