#!/usr/bin/env python3
"""Shows what the model sees of images, samples and rows, without training anything.

    python tools/inspect_data.py image photo.jpg scan.png             one line each
    python tools/inspect_data.py image photo.jpg --json               all fields, comparable with golden files
    python tools/inspect_data.py image photo.jpg --tensors views.npz  the pixels that the model gets
    python tools/inspect_data.py sizes 1920x1080 728x728              layout and token count from sizes alone
    python tools/inspect_data.py sample run.yaml --domain vqa --index 3 --out sample.png
    python tools/inspect_data.py sample a.tar data.tokenizer=tokenizer.json --id a/7 --out sample.png
    python tools/inspect_data.py row run.yaml --step 10 --row 0 --world-size 16 --out row.png
    python tools/inspect_data.py survey web/ --format html            what would be refused, and why

`sample` and `row` print a text and draw a picture: the views of a sample in their grid, its tokens and which are
scored; the documents, views and scored positions of a row, and which rank holds and encodes what. Keys of the run
may be given as `section.key=value`, for data files too (`data.tokenizer=`, `data.data_root=`, `preset=`).

`image` and `sizes` do not apply the limits of a data set (`data.max_crops`, `data.max_aspect_ratio`). An image that
cannot be used gets an entry `error` with `reason` and `detail`; the others are still shown, and the exit code
is then 1. `--tensors` writes float32 `global` [3, G, G] and `crops` [n, 3, C, C] for one image, `0.global`,
`0.crops`, `1.global`, ... in the order of the command line for several.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

# A clone shows what its own code does, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.config.hf_config import model_from_hf  # noqa: E402
from megatron_vl.config.load import load_run  # noqa: E402
from megatron_vl.config.mixture import DomainConfig  # noqa: E402
from megatron_vl.config.model import ModelConfig  # noqa: E402
from megatron_vl.config.schema import RunConfig  # noqa: E402
from megatron_vl.data.crops import BOUNDARY_RULES, CropRule, num_image_tokens, plan_crops  # noqa: E402
from megatron_vl.data.sources.megatron_bin import TokenRule  # noqa: E402
from megatron_vl.data.sources.open import FORMATS, open_source  # noqa: E402
from megatron_vl.data.sources.survey import survey  # noqa: E402
from megatron_vl.errors import ImageRefused, MegatronVLError  # noqa: E402
from megatron_vl.plan.checks import load_checked_run  # noqa: E402

SIZE_COLUMNS = ("resized_w", "resized_h", "window", "canvas_w", "canvas_h", "cols", "rows", "tokens")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, 1 = something was refused, 2 = a bad command."""
    options = _parsed(arguments)
    commands = {"sample": _draw_sample, "row": _draw_row, "survey": _survey}
    try:
        return commands.get(options.command, _measure)(options)
    except MegatronVLError as error:
        print(f"inspect_data.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if not error.filename:
            raise
        print(f"inspect_data.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; keys of the run may stand anywhere in it, which argparse does not do by itself."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    keys = [item for item in rest if "=" in item and not item.startswith("-")]
    if len(keys) < len(rest):
        parser.error(f"not understood: {' '.join(rest)}")
    if keys:
        options.overrides += keys
    return options


def _measure(options: argparse.Namespace) -> int:
    """`image` and `sizes`."""
    model = model_from_hf(options.hf) if options.hf else ModelConfig()
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


def _draw_sample(options: argparse.Namespace) -> int:
    from megatron_vl.data.draw.find import find_sample
    from megatron_vl.data.draw.paint import paint
    from megatron_vl.data.draw.sample import Views, describe_sample, sample_lines
    from megatron_vl.data.draw.sample_layout import lay_out_sample

    config = _run_of_sample(options)
    raw, piece, domain = find_sample(config, options.domain, options.index, options.id, _say)
    sample, planned = describe_sample(raw, domain, config, piece)
    print("\n".join(sample_lines(sample)))
    if options.out:
        paint(lay_out_sample(sample), Views(planned, config)).save(options.out)
    return int(sample.refused is not None)


def _run_of_sample(options: argparse.Namespace) -> RunConfig:
    """The run that a YAML file describes, or one whose only domain is the given data."""
    what, hf = options.what, options.hf
    if what.endswith((".yaml", ".yml")):
        return load_run(what, options.overrides, hf).config
    config = load_run(None, options.overrides, hf).config
    domain = DomainConfig("data", [what], format=options.format, action_schema=options.action_schema)
    return replace(config, data=replace(config.data, domains=[domain]))


def _draw_row(options: argparse.Namespace) -> int:
    from megatron_vl.data.draw.find import find_row
    from megatron_vl.data.draw.paint import paint
    from megatron_vl.data.draw.row_layout import lay_out_row
    from megatron_vl.data.draw.row_text import document_lines, number_lines
    from megatron_vl.plan.layout import Layout

    config = load_checked_run(options.config, options.overrides, options.hf, options.world_size).config
    world_size = options.world_size or config.parallel.model_parallel_size
    layout = Layout.from_config(config.parallel, world_size)
    row = find_row(config, layout, options.step, options.row, _say)
    print("\n".join([row.title, *number_lines(row), "", *document_lines(row)]))
    if options.out:
        paint(lay_out_row(row)).save(options.out)
    return 0


def _survey(options: argparse.Namespace) -> int:
    rule = TokenRule.for_model(model_from_hf(options.hf) if options.hf else ModelConfig())
    schema, found = options.action_schema, {}
    for path in options.paths:
        source = open_source(path, options.format, say=_say, action_schema=schema, token_rule=rule)
        try:
            found[path] = survey(source)
        finally:
            source.close()
    if options.json:
        print(json.dumps({path: vars(counts) for path, counts in found.items()}, indent=1))
    else:
        print("\n".join(f"{path}: {counts}" for path, counts in found.items()))
    return int(any(counts.refused or counts.left_out for counts in found.values()))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
        command.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
        command.add_argument(
            "--boundary-rule",
            choices=BOUNDARY_RULES,
            default="le",
            help="is an image exactly as long as the global view small (le, default) or large (lt)",
        )
    drawn = _add_drawing_commands(commands)
    for command in (image, sizes, *drawn):
        command.add_argument(
            "--hf", metavar="DIR", help="view sizes and token ids of this released-style checkpoint"
        )
    return parser


def _add_drawing_commands(commands: argparse._SubParsersAction) -> list[argparse.ArgumentParser]:
    sample = commands.add_parser("sample", help="one sample: its views, tokens and which are scored")
    sample.add_argument("what", metavar="RUN.yaml|DATA", help="a run, or a file or folder of data")
    sample.add_argument("--domain", metavar="NAME", help="domain of the run; default: its first")
    which = sample.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, metavar="N", help="number in the domain, from 0; default: 0")
    which.add_argument("--id", metavar="ID", help="the first sample, or piece of one, of this id")
    row = commands.add_parser("row", help="one row of a step: documents, views, and which rank holds what")
    row.add_argument("config", metavar="RUN.yaml")
    row.add_argument("--step", type=int, default=0, metavar="N", help="step of the run, from 0")
    row.add_argument("--row", type=int, default=0, metavar="R", help="row of the step over all ranks, from 0")
    row.add_argument("--world-size", type=int, metavar="N", help="ranks; default: the fewest that fit")
    survey = commands.add_parser("survey", help="read all samples: how many are refused, by reason")
    survey.add_argument("paths", nargs="+", metavar="PATH")
    survey.add_argument("--json", action="store_true", help="print JSON instead of a line")
    for command in (sample, row):
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys of the run")
        command.add_argument("--out", metavar="OUT.png", help="draw the picture; without: the text alone")
    for command in (sample, survey):
        command.add_argument(
            "--format", choices=FORMATS, default="auto", help="of data files; see docs/data.md"
        )
        command.add_argument("--action-schema", metavar="FILE", help="the actions of format gui")
    return [sample, row, survey]


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
