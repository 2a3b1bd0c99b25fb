"""`python -m megatron_vl COMMAND ...`. Each command is a module that is imported only when it is run."""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
from collections.abc import Sequence

from megatron_vl import __version__
from megatron_vl.errors import MegatronVLError

# Command: (module with `main(argv)`, what it does).
COMMANDS: dict[str, tuple[str, str]] = {
    "config": ("megatron_vl.plan.command", "print the resolved run, its parameters, cost, ranks and stages"),
    "plan": (
        "megatron_vl.train.dry_run",
        "predict memory and step time of a layout: CONFIG --gpu TYPE --gpus N [--rank R]",
    ),
    "rl": ("megatron_vl.rl.command", "reinforce: CONFIG [--nproc N] [section.key=value ...]"),
    "filter": (
        "megatron_vl.rl.filtration",
        "keep the prompts worth training on: CONFIG --out DIR [--nproc N] ...",
    ),
    "generate": (
        "megatron_vl.generate.command",
        "answer a prompt: CONFIG --prompt TEXT [--image FILE] [--nproc N] ...",
    ),
    "pretrain": ("megatron_vl.train.pretrain", "train: CONFIG [--nproc N] [section.key=value ...]"),
    "sft": ("megatron_vl.train.sft", "fine-tune weights on conversations: the same arguments"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"megatron_vl {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"unknown command {name!r}\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
    except MegatronVLError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if name in ("pretrain", "sft") else 0  # a run that lost its reader is not finished


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_text}" for name, (_, help_text) in COMMANDS.items()]
    return "\n".join(["usage: python -m megatron_vl COMMAND ...", "", *lines])


if __name__ == "__main__":
    faulthandler.enable()  # where Python was when native code ends the process
    sys.exit(main())
