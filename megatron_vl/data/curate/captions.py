"""Choosing a caption for each image out of scored candidates.

Candidates stand beside the path of an image, as whoever scored them left them:

    {"type": "image", "image": "a.jpg", "captions": [{"text": "...", "score": 0.31, "origin": "alt"}, ...]}

The chosen text becomes a text part behind the image. Origins (above, below, alt) are kept, not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vl.data.bad_samples import SampleRefused


@dataclass(frozen=True)
class CaptionedRecord:
    """record: as before, with chosen captions in its content. chosen: images that got one. without: that did not."""

    record: dict
    chosen: int
    without: int


def choose_caption(candidates: object, min_score: float | None) -> int | None:
    """Index of the candidate with the highest score, the first among equals; None when all are below the least.

    Raises SampleRefused bad_captions for anything but [{"text": non-blank string, "score": finite number}].
    """
    if not isinstance(candidates, list):
        raise SampleRefused(
            "bad_captions", f"captions is a {type(candidates).__name__}, not a list of candidates"
        )
    best, best_score = None, -math.inf
    for number, candidate in enumerate(candidates):
        score = _score(candidate, number)
        if score > best_score and (min_score is None or score >= min_score):
            best, best_score = number, score
    return best


def caption_images(record: Mapping[str, object], min_score: float | None) -> CaptionedRecord | None:
    """Puts the chosen captions into the document `record`; None when no image has candidates.

    The candidates stay in the record as "caption_candidates": [{"image": k, "chosen": i or null,
    "candidates": [...]}], so that the choice can be checked later. Raises SampleRefused bad_captions.
    """
    content = record.get("content")
    parts = content if isinstance(content, list) else []
    if not any(isinstance(part, Mapping) and "captions" in part for part in parts):
        return None
    new_parts, kept = [], []
    images = 0
    for part in parts:
        if not isinstance(part, Mapping) or "captions" not in part:
            new_parts.append(part)
            images += isinstance(part, Mapping) and part.get("type") != "text"
            continue
        candidates = part["captions"]
        chosen = choose_caption(candidates, min_score)
        kept.append({"image": images, "chosen": chosen, "candidates": candidates})
        new_parts.append({name: value for name, value in part.items() if name != "captions"})
        images += 1
        if chosen is not None:
            new_parts.append({"type": "text", "text": candidates[chosen]["text"]})
    chosen_count = sum(entry["chosen"] is not None for entry in kept)
    new_record = {**record, "content": new_parts, "caption_candidates": kept}
    return CaptionedRecord(new_record, chosen_count, len(kept) - chosen_count)


def _score(candidate: object, number: int) -> float:
    where = f"captions[{number}]"
    if not isinstance(candidate, Mapping):
        raise SampleRefused("bad_captions", f"{where} is a {type(candidate).__name__}, not an object")
    text, score = candidate.get("text"), candidate.get("score")
    if not isinstance(text, str) or not text.strip():
        raise SampleRefused("bad_captions", f"{where} has no text")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise SampleRefused("bad_captions", f"{where}.score is {score!r}; it must be a finite number")
    return float(score)
