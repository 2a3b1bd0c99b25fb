#!/usr/bin/env python3
"""Shows what preprocessing makes of images, without training anything.

    python tools/inspect_data.py image photo.jpg scan.png             one line each
    python tools/inspect_data.py image photo.jpg --json               all fields, comparable with golden files
    python tools/inspect_data.py image photo.jpg --tensors views.npz  the pixels that the model gets
    python tools/inspect_data.py sizes 1920x1080 728x728              layout and token count from sizes alone

The limits of a data set (`data.max_crops`, `data.max_aspect_ratio`) are not applied here. An image that
cannot be used gets an entry `error` with `reason` and `detail`; the others are still shown, and the exit code
is then 1. `--tensors` writes float32 `global` [3, G, G] and `crops` [n, 3, C, C] for one image, `0.global`,
`0.crops`, `1.global`, ... in the order of the command line for several.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

# A clone shows what its own code does, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.config.hf_config import model_from_hf  # noqa: E402
from megatron_vl.config.model import ModelConfig  # noqa: E402
from megatron_vl.data.crops import BOUNDARY_RULES, CropRule, num_image_tokens, plan_crops  # noqa: E402
from megatron_vl.errors import ConfigError, ImageRefused  # noqa: E402

SIZE_COLUMNS = ("resized_w", "resized_h", "window", "canvas_w", "canvas_h", "cols", "rows", "tokens")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, 1 = something was refused, 2 = a bad command."""
    options = _parser().parse_args(arguments)
    try:
        model = model_from_hf(options.hf) if options.hf else ModelConfig()
    except ConfigError as error:
        print(f"inspect_data.py: {error}", file=sys.stderr)
        return 2
    rule = CropRule.for_model(model.vision.image_size, model.vision.crop_size, options.boundary_rule)
    if options.command == "image":
        try:
            records = _inspect_images(options, rule, model)
        except OSError as error:
            print(f"inspect_data.py: cannot write {options.tensors}: {error.strerror}", file=sys.stderr)
            return 2
    else:
        records = [_inspect_size(size, rule, model) for size in options.sizes]
    print(json.dumps(records, indent=1) if options.json else _table(records))
    return int(any("error" in record for record in records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    image = commands.add_parser("image", help="decode image files and make their views")
    image.add_argument("files", nargs="+", metavar="FILE")
    image.add_argument(
        "--alpha",
        choices=("white", "drop"),
        default="white",
        help="transparent images: laid over white (default), or alpha ignored",
    )
    image.add_argument("--tensors", metavar="OUT.npz", help="write the pixel tensors of all views")
    sizes = commands.add_parser("sizes", help="layout and token count of image sizes")
    sizes.add_argument("sizes", nargs="+", metavar="WxH")
    for command in (image, sizes):
        command.add_argument(
            "--hf", metavar="DIR", help="view sizes and token ids of this released-style checkpoint"
        )
        command.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
        command.add_argument(
            "--boundary-rule",
            choices=BOUNDARY_RULES,
            default="le",
            help="is an image exactly as long as the global view small (le, default) or large (lt)",
        )
    return parser


def _inspect_images(options: argparse.Namespace, rule: CropRule, model: ModelConfig) -> list[dict[str, Any]]:
    """One record per file. Errors: `OSError` when the tensors cannot be written."""
    import numpy as np  # here, as torch behind the next imports: `sizes` needs neither

    from megatron_vl.data.decode import DecodeRule
    from megatron_vl.data.describe import describe_image

    decode_rule = DecodeRule(alpha=options.alpha, clip_high_depth_grey=True)
    tensors: dict[str, np.ndarray] = {}
    records = []
    for index, file in enumerate(options.files):
        prefix = f"{index}." if len(options.files) > 1 else ""
        views: dict[str, np.ndarray] | None = {} if options.tensors else None
        try:
            record = describe_image(file, rule, decode_rule, model, views)
        except ImageRefused as refusal:
            record = _error(refusal.reason, refusal.detail)
        records.append({"file": file, **record})
        tensors.update({prefix + name: pixels for name, pixels in (views or {}).items()})
    if options.tensors:
        with open(options.tensors, "wb") as out:  # opened here, or numpy would append .npz to other names
            np.savez(out, **tensors)
    return records


def _inspect_size(text: str, rule: CropRule, model: ModelConfig) -> dict[str, Any]:
    """Layout and token count of one WxH: by column, and as a row of `sizes.json`."""
    match = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", text)
    if not match:
        return {"size": text, **_error("bad_size", "a size is written WIDTHxHEIGHT, for example 1920x1080")}
    try:
        plan = plan_crops(int(match[1]), int(match[2]), rule)
    except ImageRefused as refusal:
        return {"size": text, **_error(refusal.reason, refusal.detail)}
    tokens = num_image_tokens(plan, model.vision.global_tokens, model.vision.crop_tokens)
    values = [*plan.resized, plan.window, *(plan.canvas or (0, 0)), plan.cols, plan.rows, tokens]
    columns = dict(zip(SIZE_COLUMNS, values, strict=True))
    return {"size": list(plan.size), "rule": rule.name, **columns, rule.name: values}


def _error(reason: str, detail: str) -> dict[str, Any]:
    return {"error": {"reason": reason, "detail": detail}}


def _table(records: list[dict[str, Any]]) -> str:
    """Records as aligned columns; what was refused as one line with the reason."""
    shown = [{key: _cell(value) for key, value in record.items()} for record in records]
    names = [
        "file",
        "format",
        "mode",
        "size",
        "resized",
        "window",
        "canvas",
        "cols",
        "rows",
        "num_crops",
        "num_tokens",
    ]
    if not any("file" in record for record in records):
        names = ["size", *SIZE_COLUMNS]
    good = [record for record in shown if "error" not in record]
    widths = {name: max([len(name)] + [len(record[name]) for record in good]) for name in names}
    lines = ["  ".join(name.ljust(widths[name]) for name in names)] if good else []
    for record in shown:
        if "error" in record:
            lines.append(f"{record.get('file') or record['size']}  {record['error']}")
        else:
            lines.append("  ".join(record[name].ljust(widths[name]) for name in names))
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "reason" in value:
        return f"refused ({value['reason']}): {value['detail']}"
    if isinstance(value, list) and len(value) == 2:
        return f"{value[0]}x{value[1]}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
