"""``python -m megatron_vl rl`` on ranks that are already there."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

from megatron_vl.checkpoint.progress import Progress
from megatron_vl.config.load import LoadedRun
from megatron_vl.errors import MegatronVLError
from megatron_vl.generate.weight_version import vision_version
from megatron_vl.parallel.heartbeat import Phase
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.rl.filtration import parse, run_filter
from megatron_vl.rl.loop import resume, train
from megatron_vl.rl.run import RlRun, prepare


@dataclass
class Reinforced:
    """What one rank saw. vision: digests of tower and projector before and after. optimized: weights it updates."""

    progress: Progress | None
    printed: str
    error: str = ""
    vision: tuple[str, str] = ("", "")
    vision_is_optimized: bool = False


def reinforce(loaded: LoadedRun, spoil: str = "") -> Reinforced:
    """Prepare, resume, train. spoil: a name of `SPOILERS`, done to the run before it trains."""
    config, progress, error = loaded.config, None, ""
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run = prepare(loaded, runtime, Phase())
        run.models.turns.all_here()
        before = vision_version(run.models.actor)
        try:
            SPOILERS[spoil](run)
            progress = train(run, resume(run))
        except MegatronVLError as raised:
            error = f"{type(raised).__name__}: {raised}"
        finally:
            run.close()
        run.models.turns.all_here()
        versions = (before, vision_version(run.models.actor))
    return Reinforced(progress, printed.getvalue(), error, versions, _optimizes_vision(run))


def keep_prompts(loaded: LoadedRun, words: list[str], spoil: str = "") -> Reinforced:
    """``python -m megatron_vl filter`` behind its checks. words: its command line."""
    config, error = loaded.config, ""
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run = prepare(loaded, runtime, Phase())
        try:
            SPOILERS[spoil](run)
            run_filter(run, parse(words))
        except MegatronVLError as raised:
            error = f"{type(raised).__name__}: {raised}"
        finally:
            run.close()
    return Reinforced(None, printed.getvalue(), error)


def _optimizes_vision(run: RlRun) -> bool:
    """Whether any gradient buffer, and so the optimizer, holds a weight of tower or projector."""
    held = set()
    for chunk in run.models.actor.chunks:
        for buffer in chunk.buffers:
            held |= {id(parameter) for parameter in buffer.params}
    vision = [p for chunk in run.models.actor.chunks for p in chunk.module.vision_parameters()]
    return any(id(parameter) in held for parameter in vision)


def _nothing(run: RlRun) -> None:
    """Leave the run as it is."""


def _stop_in_the_second_wave(run: RlRun) -> None:
    """A request to stop that comes while responses are drawn."""
    waves, plain = [0], run.rollouts.generate

    def generate(requests, params):
        waves[0] += 1
        if waves[0] == 2:
            run.stop.number = 15
        return plain(requests, params)

    run.rollouts.generate = generate


def _verifier_breaks(run: RlRun) -> None:
    """Every verdict is an exception of the verifier."""
    from megatron_vl.rl.rewards import score

    def broken(*arguments):
        raise RuntimeError("planted")

    score.score, plain = broken, score.score
    run.closing.callback(setattr, score, "score", plain)


SPOILERS = {"": _nothing, "stop": _stop_in_the_second_wave, "verifier": _verifier_breaks}
