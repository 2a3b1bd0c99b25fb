"""The third pass: the files of one chunk, from its lines, what the rules found, and what was decided."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from PIL import Image

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.curate.grounding import GroundedObject, show_objects
from megatron_vl.data.curate.mosaic import join_objects, join_texts, paint, place_four, to_jpeg
from megatron_vl.data.curate.outcome import Outcome, Pair
from megatron_vl.data.curate.reasons import Finding
from megatron_vl.data.curate.records import to_line, to_record
from megatron_vl.data.curate.rules import CurationConfig
from megatron_vl.data.curate.state import write_atomically
from megatron_vl.data.decode import DecodeRule, load_rgb
from megatron_vl.data.image_checks import resolve_under
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.sample import ImagePart, Sample, TextPart
from megatron_vl.errors import DataError, ImageRefused


@dataclass(frozen=True)
class ChunkDecisions:
    """Decisions about one chunk, by place in it. merged: pairs that are written as a mosaic only.

    mosaics: place of the first pair -> the four pairs and their ids; the mosaic is written in its place.
    """

    dropped: dict[int, Finding] = field(default_factory=dict)
    merged: set[int] = field(default_factory=set)
    mosaics: dict[int, list[tuple[str, Pair]]] = field(default_factory=dict)


@dataclass
class ChunkFiles:
    """Content of the output of a chunk, and counts for the report: category -> code -> number."""

    kept: list[bytes] = field(default_factory=list)
    dropped: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, category: str, code: str, number: int = 1) -> None:
        if number:
            self.counts.setdefault(category, Counter())[code] += number


def write_chunk(
    config: CurationConfig,
    lines: Sequence[RawLine],
    outcomes: Sequence[Outcome],
    decisions: ChunkDecisions,
    source_name: str,
    first: int,
) -> ChunkFiles:
    """Applies the decisions. first: number of the first line within its source; it names the mosaics.

    Writes the images of mosaics; the rest is returned. Raises DataError when data changed since the first pass.
    """
    files = ChunkFiles()
    for place, (raw, outcome) in enumerate(zip(lines, outcomes, strict=True)):
        if (outcome.source, outcome.line) != (raw.source, raw.line):
            raise DataError(f"{raw.source}:{raw.line}: was {outcome.source}:{outcome.line} in the first pass")
        _count_findings(files, outcome)
        if outcome.reason is None and place in decisions.dropped:
            finding = decisions.dropped[place]
            outcome.drop(finding.reason, finding.detail)
        if outcome.reason is not None:
            files.count("samples", "dropped")
            files.count("dropped", outcome.reason)
            files.dropped.append(_json(asdict(outcome.as_bad_sample())))
            continue
        _count_edits(files, outcome)
        if place in decisions.merged:
            files.count("samples", "merged_into_mosaics")
        else:
            files.count("samples", "kept")
            files.kept.append(to_line(outcome.record) if outcome.record else _as_it_stands(raw))
        if place in decisions.mosaics:
            files.count("samples", "mosaics_added")
            name = f"{source_name}-{first + place:010d}.jpg"
            files.kept.append(make_mosaic(config, decisions.mosaics[place], name))
    return files


def make_mosaic(config: CurationConfig, members: Sequence[tuple[str, Pair]], name: str) -> bytes:
    """Writes the picture of a mosaic to `<output>/mosaic/<name>` and returns its line.

    Its id is "mosaic:" and the four ids; they also stand under "made_from".
    """
    rule, convention = config.mosaic, config.grounding.coordinate_convention
    pairs = [pair for _, pair in members]
    placements = place_four([tuple(pair.size) for pair in pairs], rule.cell, rule.max_upscale)
    canvas = paint([_load(config, pair) for pair in pairs], placements, rule.cell, rule.fill)
    path = os.path.join(config.output, "mosaic", name)
    write_atomically(path, to_jpeg(canvas, rule.quality))
    own = [[GroundedObject(**item) for item in pair.objects] for pair in pairs]
    text = join_texts(rule.template, [pair.text for pair in pairs], [len(items) for items in own])
    ids = [sample_id for sample_id, _ in members]
    in_root = os.path.relpath(os.path.realpath(path), os.path.realpath(config.data_root))
    sample = Sample("mosaic:" + "+".join(ids), document=(ImagePart(in_root), TextPart(text)))
    sizes = [canvas.size]
    objects = join_objects(own, placements)
    try:
        if config.grounding.enabled:
            sample = show_objects(sample, objects, convention, sizes)
        record = to_record(
            sample, {"made_from": ids}, [item.as_record(convention, sizes) for item in objects]
        )
        return to_line(record)
    except SampleRefused as refusal:  # the four were fine, so the template must be what is wrong
        raise DataError(
            f"mosaic.template makes no sample of {', '.join(ids)}: {refusal}; correct it"
        ) from refusal


def store_chunk(files: ChunkFiles, paths: dict[str, str]) -> None:
    """Writes the files of a chunk; the counts come last and mark it as done."""
    for kind in ("kept", "dropped", "removed"):
        write_atomically(paths[kind], b"".join(line + b"\n" for line in getattr(files, kind)))
    write_atomically(paths["counts"], json.dumps(files.counts, sort_keys=True).encode())


def _load(config: CurationConfig, pair: Pair) -> Image.Image:
    decode = DecodeRule(max_pixels=config.failed_images.max_image_pixels)
    try:
        rgb = load_rgb(resolve_under(config.data_root, pair.image), decode)
    except ImageRefused as refusal:
        raise DataError(
            f"{pair.image}: could be read in the first pass, now {refusal}; do not change data"
        ) from refusal
    if rgb.size != tuple(pair.size):
        raise DataError(
            f"{pair.image}: was {pair.size} in the first pass, now {rgb.size}; do not change data"
        )
    return rgb


def _count_findings(files: ChunkFiles, outcome: Outcome) -> None:
    files.count("samples", "read")
    files.count("images", "seen", outcome.images)
    for reason, number in outcome.failed.items():
        files.count("failed_images", reason, number)
    if outcome.benchmark_item is not None:
        files.count("benchmark_items", outcome.benchmark_item)


def _count_edits(files: ChunkFiles, outcome: Outcome) -> None:
    files.count("images", "too_flat_to_compare", outcome.flat)
    for name, number in outcome.edits.items():
        files.count("edits", name, number)
    if outcome.removed:
        files.count("edits", "documents_that_lost_images")
    for path, reason, detail in outcome.removed:
        files.count("removed_images", reason)
        where = {"id": outcome.id, "source": outcome.source, "line": outcome.line, "image": path}
        files.removed.append(_json({**where, "reason": reason, "detail": detail}))


def _json(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def _as_it_stands(raw: RawLine) -> bytes:
    """The line without white space around it, and without the mark that a file may begin with."""
    return raw.data.strip().removeprefix(b"\xef\xbb\xbf").strip()
