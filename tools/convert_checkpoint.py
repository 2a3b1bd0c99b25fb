#!/usr/bin/env python3
"""Weights between Hugging Face folders and checkpoints of the trainer; comparing and looking into both.

    convert_checkpoint.py import --hf DIR --out CK                a released checkpoint to a checkpoint folder
    convert_checkpoint.py import --text DIR --vision FILE --preset step3_vl_10b --out CK     put together from parts
    convert_checkpoint.py export --checkpoint CK --out DIR [--hf-template DIR]               and back
    convert_checkpoint.py verify A B [--logits]                   folders of either kind, or digest files
    convert_checkpoint.py inspect CK_OR_HF [--digests FILE]       what is in it
    convert_checkpoint.py inspect --make-random DIR --preset step3_vl_10b                    a random one, any size
    convert_checkpoint.py resave --checkpoint CK --out CK2 --nproc 4 parallel.tensor_model_parallel_size=2 ...

No ranks are launched (but for --logits and resave) and no GPU is used; tensors are streamed in blocks of 16 MiB. CK
is a step_* folder, or a checkpoints or run folder (then its newest). Targets are written aside and renamed when
complete. Exit code 0: done, or equal; 1: different (verify); 2: an error, and nothing was changed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# A clone runs its own code, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.checkpoint.compare import compare, digests_of, open_side  # noqa: E402
from megatron_vl.checkpoint.convert import (  # noqa: E402
    ASKED,
    KEEP,
    Options,
    Result,
    export_hf,
    import_hf,
    write_checkpoint,
)
from megatron_vl.checkpoint.describe import describe, lines  # noqa: E402
from megatron_vl.checkpoint.digests import write_digests  # noqa: E402
from megatron_vl.checkpoint.folder import find  # noqa: E402
from megatron_vl.checkpoint.meter import summary, table  # noqa: E402
from megatron_vl.checkpoint.parts import assemble  # noqa: E402
from megatron_vl.checkpoint.random_release import make_random  # noqa: E402
from megatron_vl.checkpoint.weights import CheckpointWeights, HFWeights, open_weights  # noqa: E402
from megatron_vl.config.model import ModelConfig  # noqa: E402
from megatron_vl.errors import ConfigError, MegatronVLError  # noqa: E402
from megatron_vl.plan.checks import load_checked_run  # noqa: E402

SHOWN_DIFFERENCES = 50


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except MegatronVLError as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint.py: interrupted; nothing was changed", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="import|export|verify|inspect|resave")
    _add_import(commands.add_parser("import", help="a Hugging Face folder, or parts, to a checkpoint folder"))
    _add_export(commands.add_parser("export", help="a checkpoint folder to a Hugging Face folder"))
    _add_verify(commands.add_parser("verify", help="compare tensor by tensor"))
    _add_inspect(commands.add_parser("inspect", help="what is in a folder; digests; a random checkpoint"))
    _add_resave(commands.add_parser("resave", help="load into the ranks of a layout and save from there"))
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, metavar="DIR", help="folder in the released layout")
    parser.add_argument("--text", type=Path, metavar="DIR", help="part: a Qwen3ForCausalLM folder")
    parser.add_argument("--vision", type=Path, metavar="FILE|DIR", help="part: a PE-lang checkpoint")
    parser.add_argument("--seed", type=int, help="of what the parts leave to draw (default: train.seed)")
    parser.add_argument(
        "--resize-positions",
        action="store_true",
        help="resize a position table of another resolution (bilinear)",
    )
    _add_model(parser)
    _add_target(parser)
    _add_conversion(parser)
    parser.set_defaults(run=_import)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CK", help="checkpoint or run folder"
    )
    parser.add_argument(
        "--hf-template", type=Path, metavar="DIR", help="folder to copy config, tokenizer, remote code from"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file, in 10^9 bytes (default 5)")
    _add_target(parser)
    _add_conversion(parser)
    parser.set_defaults(run=_export)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(
            name, type=Path, metavar=name.upper(), help="folder of either kind, or digest file"
        )
    parser.add_argument("--logits", action="store_true", help="also run both on the same inputs, in fp32")
    _add_threads(parser)
    parser.set_defaults(run=_verify)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", metavar="CK_OR_HF", help="folder of either kind")
    parser.add_argument("--digests", type=Path, metavar="FILE", help="write a digest of every tensor (JSON)")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--make-random", type=Path, metavar="DIR", help="write a random HF folder instead")
    parser.add_argument("--random-seed", type=int, default=0, help="of --make-random")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file of --make-random")
    parser.add_argument("--dtype", choices=tuple(ASKED), default="bf16", help="of --make-random")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    _add_model(parser)
    _add_threads(parser)
    parser.set_defaults(run=_inspect)


def _add_resave(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CK", help="weights to load")
    parser.add_argument("--out", type=Path, required=True, metavar="CK2", help="checkpoint folder to write")
    parser.add_argument("--nproc", type=int, default=1, help="ranks to start on this machine (CPU)")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="layout of those ranks")
    parser.set_defaults(run=_resave)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="model by name, e.g. step3_vl_10b")
    parser.add_argument("--config", metavar="YAML", help="model of a run file")
    parser.add_argument("--set", action="append", default=[], metavar="model.key=value", help="change a key")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an existing target")


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=(KEEP, *ASKED), default=KEEP, help="number format (default: of the source)"
    )
    parser.add_argument(
        "--consume",
        action="store_true",
        help="REMOVE each source file once its tensors are on the disk",
    )
    parser.add_argument("--digests", type=Path, metavar="FILE", help="write a digest of every tensor (JSON)")
    _add_threads(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=_positive, default=os.cpu_count() or 1, help="default: one per core"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _options(options: argparse.Namespace) -> Options:
    digests = options.digests
    if options.consume:
        digests = digests or options.out.with_name(options.out.name + ".digests.json")
        print(
            f"--consume: source files are REMOVED as soon as their tensors are on the disk; digests go to {digests}",
            file=sys.stderr,
        )
    return Options(options.threads, options.dtype, options.force, options.consume, digests)


def _model(options: argparse.Namespace) -> ModelConfig:
    """The model of --preset or --config.

    Raises:
        ConfigError: neither, or not a legal model.
    """
    if options.preset is None and options.config is None:
        raise ConfigError("which model? Give --preset NAME or --config YAML")
    settings = [f"preset={options.preset}"] if options.preset else []
    return load_checked_run(options.config, [*settings, *options.set]).config.model


def _import(options: argparse.Namespace) -> int:
    parts = options.text is not None or options.vision is not None
    if (options.hf is not None) == parts:
        raise ConfigError("give --hf DIR, or parts with --text and --vision")
    if options.hf is not None:
        wrong = [name for name in ("preset", "config", "seed") if getattr(options, name) is not None]
        if wrong:
            raise ConfigError(f"--{wrong[0]} is for parts; with --hf the model is its config.json's")
        _print_result(import_hf(HFWeights(options.hf), options.out, _options(options)))
        return 0
    if options.consume:
        raise ConfigError("--consume is not for parts: their files are not only this model's")
    model = _model(options)
    seed = options.seed if options.seed is not None else load_checked_run().config.train.seed
    made = assemble(model, options.text, options.vision, seed, options.resize_positions)
    print(
        table(
            [("part", "tensors", "from"), *((name, str(count), where) for name, count, where in made.origins)]
        )
    )
    for note in made.notes:
        print(f"note: {note}")
    origin = "; ".join(f"{name}: {where}" for name, _, where in made.origins)
    _print_result(write_checkpoint(made.weights, model, options.out, _options(options), origin))
    return 0


def _export(options: argparse.Namespace) -> int:
    checkpoint = find(options.checkpoint)
    if not options.shard_gb > 0:
        raise ConfigError(f"--shard-gb = {options.shard_gb}: must be above 0")
    result = export_hf(
        CheckpointWeights(checkpoint),
        options.out,
        _options(options),
        options.hf_template,
        int(options.shard_gb * 1e9),
    )
    _print_result(result)
    return 0


def _print_result(result: Result) -> None:
    for name, where in result.companions:
        print(f"{name}: from {where}")
    for note in result.notes:
        print(f"note: {note}")
    print(summary(result.figures))
    print(f"wrote {result.out}")


def _verify(options: argparse.Namespace) -> int:
    sides = [open_side(path) for path in (options.a, options.b)]
    found = compare(sides[0], sides[1], options.threads)
    for sentence in found.differences[:SHOWN_DIFFERENCES]:
        print(sentence)
    if len(found.differences) > SHOWN_DIFFERENCES:
        print(f"... and {len(found.differences) - SHOWN_DIFFERENCES} more")
    print(summary(found.figures))
    equal = not found.differences
    if options.logits:
        from megatron_vl.parity.logits import compare_logits

        text, same = compare_logits(open_weights(options.a), open_weights(options.b))
        print(text)
        equal = equal and same
    print("equal" if equal else f"different: {len(found.differences)} tensor(s)")
    return 0 if equal else 1


def _inspect(options: argparse.Namespace) -> int:
    if (options.folder is None) == (options.make_random is None):
        raise ConfigError("give a folder to look into, or --make-random DIR")
    if options.make_random is not None:
        made = Options(options.threads, options.dtype, options.force, digests=options.digests)
        shard = int(options.shard_gb * 1e9)
        _print_result(make_random(_model(options), options.make_random, made, shard, options.random_seed))
        return 0
    source = open_weights(options.folder)
    found = describe(source)
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines(found)))
    if options.digests is not None:
        write_digests(options.digests, digests_of(source.weights, options.threads))
    return 0


def _resave(options: argparse.Namespace) -> int:
    from megatron_vl.parity.resave import resave

    print(f"wrote {resave(options.checkpoint, options.out, options.nproc, options.settings)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
