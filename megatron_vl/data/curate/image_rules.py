"""One image through the rules about images: read it, look at it, hash it."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from megatron_vl.data.curate.perceptual_hash import perceptual_hash
from megatron_vl.data.curate.qr import find_qr_code
from megatron_vl.data.curate.reasons import Finding
from megatron_vl.data.curate.rules import AspectRatio, CurationConfig, DegenerateImages
from megatron_vl.data.decode import DecodeRule, load_rgb, read_header
from megatron_vl.data.image_checks import resolve_under
from megatron_vl.errors import ImageRefused


@dataclass(frozen=True)
class JudgedImage:
    """What is known of an image after its rules.

    path: as in the data. size: upright (width, height), None when the file cannot be read. finding: why it is
    not used, or None; failed: the finding is one of `image_checks.REASONS`, that is, nobody could use it.
    hash: perceptual, None for flat images and where none is needed.
    """

    path: str
    size: tuple[int, int] | None = None
    finding: Finding | None = None
    failed: bool = False
    hash: int | None = None


def judge_image(path: str, config: CurationConfig, with_hash: bool) -> JudgedImage:
    """Applies the image rules in order of cost; the first finding decides. Never fetches, never raises for data.

    The pixels are decoded in every case that the header does not already decide: a header says nothing about
    a file that was cut off.
    """
    decode = DecodeRule(max_pixels=config.failed_images.max_image_pixels)
    size = None
    try:
        file = resolve_under(config.data_root, path)
        size = read_header(file, decode).size
        finding = find_bad_size(size, config.degenerate_images, config.aspect_ratio)
        if finding is not None:
            return JudgedImage(path, size, finding)
        rgb = load_rgb(file, decode)
    except ImageRefused as refusal:
        return JudgedImage(path, size, Finding(refusal.reason, refusal.detail), failed=True)
    finding = find_constant_colour(rgb, config.degenerate_images)
    if finding is None and config.qr_codes.enabled:
        finding = find_qr_code(rgb, config.qr_codes)
    return JudgedImage(path, size, finding, hash=perceptual_hash(rgb) if with_hash and not finding else None)


def find_bad_size(size: tuple[int, int], tiny: DegenerateImages, aspect: AspectRatio) -> Finding | None:
    """tiny_image or aspect_ratio (strictly more than the limit), from (width, height) in pixels."""
    width, height = size
    shorter, longer = min(size), max(size)
    if tiny.enabled and shorter < tiny.min_side:
        return Finding("tiny_image", f"{width}x{height}: the shorter side is below {tiny.min_side}")
    if aspect.enabled and longer / shorter > aspect.max_ratio:
        return Finding(
            "aspect_ratio", f"{width}x{height} is {longer / shorter:.1f}:1; the limit is {aspect.max_ratio}"
        )
    return None


def find_constant_colour(rgb: Image.Image, rule: DegenerateImages) -> Finding | None:
    """constant_image: every channel spans at most `max_flat_range` levels."""
    if not rule.enabled:
        return None
    spans = [high - low for low, high in rgb.getextrema()]
    if max(spans) > rule.max_flat_range:
        return None
    detail = f"the channels span {', '.join(map(str, spans))} levels; the limit is {rule.max_flat_range}"
    return Finding("constant_image", detail)
