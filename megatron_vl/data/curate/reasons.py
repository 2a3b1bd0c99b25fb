"""Why a sample is not kept: the codes of curation, beside those of `sample.parse_sample` and of images."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.data.image_checks import REASONS as IMAGE_REASONS

SAMPLE_REASONS = {
    "bad_captions": "caption candidates without text or score",
    "no_caption": "no candidate reaches the least score",
    "bad_objects": "boxes or points that are not on their image, or that the text cannot refer to",
    "exact_overlap": "equal to a benchmark item",
    "ngram_overlap": "shares an n-gram with a benchmark item",
    "benchmark_image": "shows an image of a benchmark",
    "repeated_lines": "most lines repeat earlier ones",
    "repeated_ngrams": "most n-grams repeat earlier ones",
    "character_run": "one character again and again",
    "looping_end": "ends in a loop",
    "unclosed_think": "<think> and </think> do not pair up",
    "empty_answer": "an assistant turn says nothing",
    "truncated_answer": "an answer stops half-way",
    "failed_images": "too large a share of the images cannot be read",
    "failed_image": "an image cannot be read",
    "near_duplicate": "shows images that an earlier sample shows",
    "cluster_cap": "its concept has enough samples",
}
IMAGE_RULE_REASONS = {
    "aspect_ratio": "longer than the aspect limit",
    "tiny_image": "smaller than the least side",
    "constant_image": "one colour",
    "qr_code": "holds a QR code",
}
FAILED_REASONS = tuple(IMAGE_REASONS)


@dataclass(frozen=True)
class Finding:
    """What a rule found. reason: the code it is counted under. detail: the sentence, with the values."""

    reason: str
    detail: str


def meaning(reason: str) -> str:
    """The sentence of a code; codes of the sample format explain themselves in their detail."""
    known = {**IMAGE_REASONS, **IMAGE_RULE_REASONS, **SAMPLE_REASONS}
    return known.get(reason, "breaks the sample format")
