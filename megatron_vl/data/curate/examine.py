"""The first pass: one line through every rule that needs to know no other line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.curate.captions import caption_images
from megatron_vl.data.curate.decontaminate import BenchmarkIndex, TextLines
from megatron_vl.data.curate.grounding import GroundedObject, read_objects, show_objects
from megatron_vl.data.curate.image_rules import JudgedImage, judge_image
from megatron_vl.data.curate.mosaic import is_chosen
from megatron_vl.data.curate.outcome import Outcome, Pair
from megatron_vl.data.curate.perceptual_hash import distances
from megatron_vl.data.curate.qr import opencv
from megatron_vl.data.curate.records import read_record, to_line, to_record
from megatron_vl.data.curate.rules import CurationConfig
from megatron_vl.data.curate.text_rules import find_degenerate_text
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.sample import ImagePart, Sample, TextPart, parse_sample


@dataclass(frozen=True)
class BenchmarkImages:
    """Perceptual hashes (uint64 [n]) of benchmark images and where they come from."""

    hashes: np.ndarray
    names: list[str]


class Examiner:
    """All rules of a run, ready to be applied to lines. Lives in every worker process.

    Raises ConfigError at construction when a rule needs a package that does not load.
    """

    def __init__(
        self,
        config: CurationConfig,
        benchmarks: BenchmarkIndex | None = None,
        benchmark_images: BenchmarkImages | None = None,
    ):
        self.config = config
        self.benchmarks = benchmarks
        self.benchmark_images = benchmark_images
        self.with_hash = config.near_duplicates.enabled or benchmark_images is not None
        if config.qr_codes.enabled:
            opencv()

    def examine(self, raw: RawLine, source_name: str, number: int) -> Outcome:
        """raw: line `number` (from 0) of the source. Never raises for what a line says."""
        outcome = Outcome(raw.default_id, raw.source, raw.line)
        try:
            sample = parse_sample(raw.data, raw.default_id)
            outcome.id = sample.id
            record = read_record(raw.data)
            self._count_what_is_off(record, outcome)
            if self.config.captions.enabled:
                sample, record = self._choose_captions(sample, record, outcome)
            self._check_text(sample, record, outcome)
            if outcome.reason is None:
                self._check_images(sample, record, outcome, source_name, number)
        except SampleRefused as refusal:
            outcome.id = refusal.sample_id or outcome.id
            outcome.drop(refusal.reason, refusal.detail)
        return outcome

    def _count_what_is_off(self, record: dict, outcome: Outcome) -> None:
        """Data for rules that are off would be lost on training without a word."""
        content = record.get("content")
        if not self.config.captions.enabled and isinstance(content, list):
            unread = sum("captions" in part for part in content)
            outcome.edits |= {"images_with_captions_not_read": unread} if unread else {}
        if not self.config.grounding.enabled and record.get("objects"):
            outcome.edits["records_with_objects_not_read"] = 1

    def _choose_captions(self, sample: Sample, record: dict, outcome: Outcome) -> tuple[Sample, dict]:
        chosen = caption_images(record, self.config.captions.min_score)
        if chosen is None:
            return sample, record
        if len(sample.images) == 1 and chosen.without:
            raise SampleRefused("no_caption", f"no candidate reaches {self.config.captions.min_score}")
        outcome.edits["captions_chosen"] = chosen.chosen
        outcome.edits["images_left_without_caption"] = chosen.without
        captioned = parse_sample(json.dumps(chosen.record).encode(), sample.id)
        if len(captioned.images) != len(sample.images):
            raise SampleRefused("bad_captions", "a candidate holds the placeholder of an image")
        outcome.record = to_record(captioned, chosen.record, chosen.record.get("objects"))
        return captioned, chosen.record

    def _check_text(self, sample: Sample, record: dict, outcome: Outcome) -> None:
        if self.benchmarks is not None:
            overlap = self.benchmarks.find(TextLines.of_sample(sample))
            if overlap is not None:
                outcome.benchmark_item = self.benchmarks.names[overlap.item]
                outcome.drop(overlap.reason, overlap.detail)
                return
        if self.config.degenerate_text.enabled:
            finding = find_degenerate_text(sample, record, self.config.degenerate_text)
            if finding is not None:
                outcome.drop(finding.reason, finding.detail)

    def _check_images(
        self, sample: Sample, record: dict, outcome: Outcome, source_name: str, number: int
    ) -> None:
        paths = [image.path for image in sample.images]
        judged = {path: judge_image(path, self.config, self.with_hash) for path in dict.fromkeys(paths)}
        images = [judged[path] for path in paths]
        outcome.images = len(images)
        outcome.failed = dict(Counter(image.finding.reason for image in images if image.failed))
        refused = [image for image in images if image.finding]
        if refused:
            self._drop_or_cut(sample, record, images, refused, outcome)
            if outcome.reason is not None:
                return
            sample = without_images(sample, {image.path for image in refused})
            outcome.record = to_record(sample, record)
            images = [image for image in images if not image.finding]
        if self._shows_benchmark(images, outcome):
            return
        outcome.hashes = [image.hash for image in images if image.hash is not None]
        outcome.flat = sum(image.hash is None for image in images) if self.with_hash else 0
        outcome.pixels = sum(image.size[0] * image.size[1] for image in images)
        objects = self._ground(sample, record, images, outcome)
        if outcome.record is not None:
            to_line(outcome.record)  # what was changed must still be a sample
        self._offer_for_mosaic(sample, record, images, objects, outcome, source_name, number)

    def _drop_or_cut(
        self,
        sample: Sample,
        record: dict,
        images: Sequence[JudgedImage],
        refused: Sequence[JudgedImage],
        outcome: Outcome,
    ) -> None:
        """Drops the sample for its refused images, or lists them as removed from the document."""
        failed = sum(image.failed for image in images)
        limit = self.config.failed_images.max_ratio
        if sample.document and len(images) > 1 and failed / len(images) > limit:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(outcome.failed.items()))
            outcome.drop(
                "failed_images",
                f"{failed} of {len(images)} images cannot be read ({reasons}); the limit is {limit}",
            )
        elif (
            not sample.document
            or len(refused) == len(images)
            or record.get("objects")  # they count images, and the text may refer to them
            or self.config.documents_with_refused_images == "drop"
        ):
            first = refused[0]
            reason = "failed_image" if first.failed else first.finding.reason
            kind = f"{first.finding.reason}: " if first.failed else ""
            outcome.drop(reason, f"{kind}{_short(first.path)}: {first.finding.detail}")
        else:
            outcome.removed = [
                [_short(image.path), image.finding.reason, image.finding.detail] for image in refused
            ]

    def _shows_benchmark(self, images: Sequence[JudgedImage], outcome: Outcome) -> bool:
        benchmark = self.benchmark_images
        if benchmark is None or not len(benchmark.hashes):
            return False
        for image in images:
            if image.hash is None:
                continue
            apart = distances(benchmark.hashes, image.hash)
            nearest = int(apart.argmin())
            if apart[nearest] <= self.config.decontamination.image_radius:
                outcome.benchmark_item = benchmark.names[nearest]
                detail = f"{image.path} is {apart[nearest]} bits from {benchmark.names[nearest]}"
                outcome.drop("benchmark_image", detail)
                return True
        return False

    def _ground(
        self, sample: Sample, record: dict, images: Sequence[JudgedImage], outcome: Outcome
    ) -> list[GroundedObject]:
        """Checks the objects and writes them in the convention of the output."""
        rule = self.config.grounding
        if not rule.enabled or "objects" not in record:
            return []
        sizes = [image.size for image in images]
        objects = read_objects(record, rule.input_convention, sizes)
        shown = show_objects(sample, objects, rule.coordinate_convention, sizes)
        entries = [item.as_record(rule.coordinate_convention, sizes) for item in objects]
        outcome.record = to_record(shown, record, entries)
        outcome.edits["objects_converted"] = len(objects)
        return objects

    def _offer_for_mosaic(
        self,
        sample: Sample,
        record: dict,
        images: Sequence[JudgedImage],
        objects: Sequence[GroundedObject],
        outcome: Outcome,
        source_name: str,
        number: int,
    ) -> None:
        rule = self.config.mosaic
        texts = [part.text for part in sample.document if isinstance(part, TextPart)]
        if not rule.enabled or (rule.sources and source_name not in rule.sources):
            return
        if len(images) != 1 or not "".join(texts).strip():
            return
        if not is_chosen(rule.seed, source_name, number, rule.probability):
            return
        if record.get("objects") and not self.config.grounding.enabled:
            return
        text = "\n".join(texts)
        outcome.pair = Pair(images[0].path, list(images[0].size), text, [asdict(item) for item in objects])


def without_images(sample: Sample, paths: set[str]) -> Sample:
    """The document without the images of these paths."""
    parts = tuple(
        part for part in sample.document if not (isinstance(part, ImagePart) and part.path in paths)
    )
    return replace(sample, document=parts)


def _short(path: str) -> str:
    """A path fit for a log: data URLs carry whole images."""
    return path if len(path) <= 200 else path[:160] + "..."
