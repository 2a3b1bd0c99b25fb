"""The command on ranks that are already there."""

from __future__ import annotations

import contextlib
import io

from megatron_vl.errors import ConfigError
from megatron_vl.generate.command import _answer, check, parse
from megatron_vl.parallel.heartbeat import Phase
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.plan.checks import load_checked_run


def command_on_rank(argv: list[str], world_size: int) -> tuple[str, str]:
    """What ``generate`` prints; a refusal as the dispatcher prints it."""
    arguments = parse(argv)
    config = load_checked_run(arguments.config, arguments.overrides, None, world_size).config
    check(config, arguments)
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            _answer(config, arguments, runtime, Phase())
        except ConfigError as error:
            print(error, file=err)
    return out.getvalue(), err.getvalue()
