"""The description of a curation run: sources, rules and their limits. YAML keys are the attribute names.

Defaults with "TR" beside them are those of the STEP3-VL technical report (arXiv 2601.09668, section 2); every
other limit is not published and ours. Rules between keys are in `curate/settings.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.key import key
from megatron_vl.data.curate.coordinates import CONVENTIONS

PROMPT_FIELDS = (
    "question",
    "prompt",
    "problem",
    "query",
    "instruction",
    "input",
    "text",
    "context",
    "solution",
)


@dataclass(frozen=True)
class Source:
    """One data set: it gets an output file and a column of the report of its own."""

    name: str = key("letters, digits, '.', '_' and '-'; names the output file")
    files: list[str] = key("JSONL files, in the order in which they are read")


@dataclass(frozen=True)
class FailedImages:
    """Images that cannot be read, whatever the cause. Always on: nobody can train on them."""

    max_ratio: float = key(
        "documents with a larger share of failed images are dropped (TR: more than 90%)",
        0.9,
        at_least=0,
        at_most=1,
    )
    max_image_pixels: int = key("images with more pixels are refused unread", 178_956_970, at_least=1)


@dataclass(frozen=True)
class AspectRatio:
    """Thin images turn into hundreds of crops (10000x32 into 336)."""

    enabled: bool = key("use this rule", True)
    max_ratio: float = key(
        "longer side over shorter side (TR names the rule, not the limit; 36 is what 36 crops can hold)",
        36.0,
        at_least=1,
    )


@dataclass(frozen=True)
class QrCodes:
    """QR codes, by OpenCV (TR names the rule, not the detector)."""

    enabled: bool = key("use this rule; needs opencv-python-headless", False)
    must_decode: bool = key(
        "only codes whose content can be read; false = also what merely looks like one", True
    )
    max_side: int = key("larger images are searched at this size, in pixels", 1536, at_least=64)


@dataclass(frozen=True)
class DegenerateText:
    """Text that repeats itself or stops half-way (TR: rule-based removal, example infinite repetition)."""

    enabled: bool = key("use this rule", True)
    min_lines: int = key("texts with fewer lines are not judged by their lines", 10, at_least=2)
    max_repeated_line_ratio: float = key(
        "share of lines that occurred before in the text", 0.5, at_least=0, at_most=1
    )
    ngram: int = key("words per n-gram", 8, at_least=1)
    min_words: int = key("texts with fewer words are not judged by n-grams", 64, at_least=2)
    max_repeated_ngram_ratio: float = key(
        "share of n-grams that occurred before in the text", 0.5, at_least=0, at_most=1
    )
    max_character_run: int = key("longest run of one character that is not white space", 256, at_least=1)
    min_loop_words: int = key("words of repetition at the end that make a loop", 96, at_least=8)
    check_answers: bool = key("empty, cut off and unclosed <think> answers", True)


@dataclass(frozen=True)
class DegenerateImages:
    """Images without content."""

    enabled: bool = key("use this rule", True)
    min_side: int = key("shorter side in pixels; 14 is one patch of the tower", 14, at_least=1)
    max_flat_range: int = key(
        "an image whose channels all span at most this many of 255 levels is constant",
        8,
        at_least=0,
        at_most=255,
    )


@dataclass(frozen=True)
class Decontamination:
    """Samples that share text (or images) with benchmarks (TR: exact match and 64-gram match)."""

    enabled: bool = key("use this rule", False)
    benchmarks: str = key("folder of benchmark files: .jsonl, .json, .csv, .tsv, .txt, images", "")
    ngram: int = key(
        "units per n-gram (TR: 64; the unit is ours: words, and single characters of CJK)", 64, at_least=8
    )
    fields: list[str] = key("keys of a record that hold prompts", factory=lambda: list(PROMPT_FIELDS))
    exact_min_words: int = key("shorter items are not matched exactly, only counted", 1, at_least=1)
    images: bool = key("also compare images with those of the folder (not in TR)", False)
    image_radius: int = key("bits of 64 in which the perceptual hashes may differ", 4, at_least=0, at_most=15)


@dataclass(frozen=True)
class NearDuplicates:
    """Samples whose images have been seen (not in TR)."""

    enabled: bool = key("use this rule", False)
    radius: int = key("bits of 64 in which the perceptual hashes may differ", 4, at_least=0, at_most=15)
    prefer: str = key(
        "who survives: the first in input order, or the one with the most pixels",
        "first",
        choices=("first", "largest"),
    )
    min_share: float = key("share of a sample's images that must have been seen", 1.0, above=0, at_most=1)


@dataclass(frozen=True)
class ConceptBalance:
    """Fewer samples of crowded concepts (TR: CLIP clusters, then resampling; numbers not published)."""

    enabled: bool = key("use this rule", False)
    sources: list[str] = key("names of the sources to balance; empty = all", factory=list)
    ids: str = key("text file, one sample id per line, in the order of the rows of the array", "")
    embeddings: str | None = key(".npy [n, d] floating point; clustered here", None)
    cluster_ids: str | None = key(".npy [n] whole numbers, instead of embeddings", None)
    num_clusters: int = key("clusters of the embeddings", 1000, at_least=1)
    iterations: int = key("rounds of k-means", 20, at_least=1)
    fit_samples: int = key("rows that k-means is fitted on; all are assigned", 200_000, at_least=1)
    seed: int = key("seed of k-means and of the choice within a cluster", 0, at_least=0)
    max_per_cluster: int | None = key("cap of every cluster", None, at_least=1)
    target_samples: int | None = key("samples to keep in all, shared out by power", None, at_least=1)
    power: float = key(
        "a cluster of n samples gets a share in proportion to n ** power: 0 = equal, 1 = as found",
        0.5,
        at_least=0,
        at_most=1,
    )
    missing: str = key(
        "samples without a row: an error, or kept and counted", "error", choices=("error", "keep")
    )


@dataclass(frozen=True)
class Captions:
    """One caption out of the candidates of an image, by scores given in the data (TR: CLIP similarity)."""

    enabled: bool = key("use this rule", False)
    min_score: float | None = key("an image whose best candidate is lower has no caption; none = any", None)


@dataclass(frozen=True)
class Grounding:
    """Boxes and points (`objects` of a record), and what is written for them."""

    enabled: bool = key("check and convert the objects of records", False)
    input_convention: str = key("numbers in the data", "pixel", choices=CONVENTIONS)
    coordinate_convention: str = key("numbers in the output (not published)", "0-1000", choices=CONVENTIONS)


@dataclass(frozen=True)
class Mosaic:
    """Four image-text pairs as one 2x2 picture (TR names it; layout, resize and text are ours)."""

    enabled: bool = key("make mosaics", False)
    sources: list[str] = key("names of the sources to take pairs from; empty = all", factory=list)
    probability: float = key("share of the pairs that go into mosaics", 0.1, at_least=0, at_most=1)
    keep_originals: bool = key("keep the four pairs beside their mosaic", False)
    cell: int = key("side of a quarter in pixels; 728 is one global view", 728, at_least=16)
    max_upscale: float = key("small images are enlarged at most this much", 2.0, at_least=1)
    fill: int = key("grey level around images that do not fill their quarter", 0, at_least=0, at_most=255)
    quality: int = key("JPEG quality of the files", 95, at_least=1, at_most=100)
    seed: int = key("seed of the choice of pairs", 0, at_least=0)
    template: str = key(
        "text of a mosaic",
        "Top left: {top_left}\nTop right: {top_right}\nBottom left: {bottom_left}\nBottom right: {bottom_right}",
    )


@dataclass(frozen=True)
class CurationConfig:
    """One curation run. Relative paths: from the working folder."""

    output: str = key("folder for the kept samples, the dropped ones and the report")
    sources: list[Source] = key("data sets, in the order of the output")
    data_root: str = key("folder that image paths are relative to and may not leave", ".")
    chunk_samples: int = key(
        "samples per piece of work; a killed run loses at most these per worker", 512, at_least=1
    )
    documents_with_refused_images: str = key(
        "documents that have other images left: lose the refused ones, or are dropped",
        "remove_images",
        choices=("remove_images", "drop"),
    )
    failed_images: FailedImages = key("unreadable images", factory=FailedImages)
    aspect_ratio: AspectRatio = key("thin images", factory=AspectRatio)
    qr_codes: QrCodes = key("QR codes", factory=QrCodes)
    degenerate_text: DegenerateText = key("repetition, cut-off answers", factory=DegenerateText)
    degenerate_images: DegenerateImages = key("images without content", factory=DegenerateImages)
    decontamination: Decontamination = key("overlap with benchmarks", factory=Decontamination)
    near_duplicates: NearDuplicates = key("images seen before", factory=NearDuplicates)
    concept_balance: ConceptBalance = key("crowded concepts", factory=ConceptBalance)
    captions: Captions = key("choice of captions", factory=Captions)
    grounding: Grounding = key("boxes and points", factory=Grounding)
    mosaic: Mosaic = key("mosaics", factory=Mosaic)
