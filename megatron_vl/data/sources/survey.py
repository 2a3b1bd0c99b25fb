"""What reading every sample of a source would refuse: counts by reason, before a run is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.sources.html_page import PageSample
from megatron_vl.data.sources.record import Source, TokenSample


@dataclass
class Survey:
    """Counts over the samples that were read.

    kept: good samples. refused: by reason. images: of good samples. left_out: single images of good pages by
    reason. tokens: of pre-tokenised samples.
    """

    kept: int = 0
    images: int = 0
    tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.kept} samples, {self.images} images, {self.tokens} tokens given as ids"]
        for title, counts in (("refused", self.refused), ("images left out", self.left_out)):
            if counts:
                shown = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
                lines.append(f"{title} {counts.total()}: {shown}")
        return "; ".join(lines)


def survey(source: Source, indices: Iterable[int] | None = None) -> Survey:
    """Reads the samples `indices` (None = all) in order. Images are not opened.

    Over all samples, what was refused while indexing is counted too, so that nothing is missing.
    """
    found = Survey()
    if indices is None:
        found.refused.update(source.refused_counts())
    for index in range(len(source)) if indices is None else indices:
        try:
            sample = source[index].parse()
        except SampleRefused as refusal:
            found.refused[refusal.reason] += 1
            continue
        found.kept += 1
        if isinstance(sample, TokenSample):
            found.tokens += len(sample.ids)
            continue
        found.images += len(sample.images)
        if isinstance(sample, PageSample):
            found.left_out.update(reason for _, reason, _ in sample.failed_images)
    return found
