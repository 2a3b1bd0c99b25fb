"""What preprocessing makes of an image, as a plain record, for inspection and comparison with golden files.

Field names are those of `tests/golden/preprocess/expected.json`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vl.config.model import ModelConfig
from megatron_vl.data.crops import CropPlan, CropRule, check_limits, expand_runs, image_ids_rle, plan_crops
from megatron_vl.data.decode import (
    DecodeRule,
    load_rgb,
    read_header,
    resize_whole,
    stretch_to_canvas,
    view_pixels,
)
from megatron_vl.data.image_checks import ImageSource


def describe_image(
    source: ImageSource,
    crop_rule: CropRule,
    decode_rule: DecodeRule,
    model: ModelConfig,
    views: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Header, layout, token string, hashes of the 8-bit stages and statistics of the pixel tensors of one
    image.

    The limits of a data set (crops, aspect ratio) are not applied; views are made one at a time, since a thin
    image may have hundreds. views: receives the float32 pixels `global` [3, G, G] and `crops` [n, 3, C, C].
    Errors: `ImageRefused`.
    """
    header = read_header(source, decode_rule)
    plan = plan_crops(*header.size, crop_rule)
    check_limits(plan, max_pixels=decode_rule.max_pixels)
    rgb = load_rgb(source, decode_rule)
    record = {
        "rule": crop_rule.name,
        "alpha": decode_rule.alpha if header.has_alpha else None,
        "format": header.format,
        "mode": header.mode,
        "stored_size": list(header.stored_size),
        "orientation": header.orientation,
        "has_alpha": header.has_alpha,
        "size": list(header.size),
        **_layout(plan, model),
        **_pixels(rgb, plan, crop_rule, views),
    }
    if header.is_high_depth_grey:
        record["note"] = f"mode {header.mode}: values above 255 are clipped to white; refused in training"
    return record


def _layout(plan: CropPlan, model: ModelConfig) -> dict[str, Any]:
    runs = image_ids_rle(plan, model.tokens, model.vision.global_tokens, model.vision.crop_tokens)
    ids = np.array(expand_runs(runs), dtype="<i4")
    return {
        "padded": plan.padded,
        "resized": list(plan.resized),
        "window": plan.window,
        "canvas": list(plan.canvas) if plan.canvas else None,
        "rows": plan.rows,
        "cols": plan.cols,
        "num_crops": plan.num_crops,
        "newline_after_crops": plan.newline_after_crops,
        "num_tokens": len(ids),
        "ids_rle": [list(run) for run in runs],
        "ids_sha256": _sha256(ids.tobytes()),
    }


def _pixels(
    rgb: Image.Image, plan: CropPlan, rule: CropRule, views: dict[str, np.ndarray] | None
) -> dict[str, Any]:
    resized = resize_whole(rgb, plan)
    canvas = stretch_to_canvas(resized, plan) if plan.canvas else None
    global_pixels = view_pixels(resized, rule.global_size)
    crop_sha256, crop_stats, crop_pixels = [], [], []
    for crop in range(plan.num_crops):
        tile = canvas.crop(plan.box(crop))
        pixels = view_pixels(tile, rule.crop_size)
        crop_sha256.append(_sha256(tile.tobytes()))
        crop_stats.append(_stats(pixels))
        if views is not None:
            crop_pixels.append(pixels.numpy())
    if views is not None:
        no_crops = np.empty((0, 3, rule.crop_size, rule.crop_size), dtype=np.float32)
        views["global"] = global_pixels.numpy()
        views["crops"] = np.stack(crop_pixels) if crop_pixels else no_crops
    return {
        "rgb_sha256": _sha256(rgb.tobytes()),
        "resized_sha256": _sha256(resized.tobytes()),
        "canvas_sha256": _sha256(canvas.tobytes()) if canvas else None,
        "crop_sha256": crop_sha256,
        "global_stats": _stats(global_pixels),
        "crop_stats": crop_stats,
    }


def _stats(pixels: torch.Tensor) -> dict[str, Any]:
    """Mean and population deviation per channel, extremes, hash. pixels: float32 [3, side, side]."""
    exact = pixels.double().flatten(1)
    return {
        "mean": [round(value, 7) for value in exact.mean(1).tolist()],
        "std": [round(value, 7) for value in exact.std(1, correction=0).tolist()],
        "min": round(exact.min().item(), 6),
        "max": round(exact.max().item(), 6),
        "sha256_float32": _sha256(pixels.numpy().tobytes()),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
