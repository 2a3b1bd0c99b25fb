"""What the ranks of the shared world do for the tests of skipped steps."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from megatron_vl.config.load import LoadedRun
from megatron_vl.errors import MegatronVLError
from megatron_vl.train import loop, prepare, step
from megatron_vl.train.build import Parts
from megatron_vl.train.run import Run
from tests.train.on_ranks import prepared


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Copies of all weights, main weights, moments and step counts of this rank."""
    state = {
        f"{number}.{name}": parameter.detach().clone()
        for number, chunk in enumerate(run.parts.chunks)
        for name, parameter in chunk.module.named_parameters()
    }
    optimizer = run.parts.optimizer
    for number, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        if part.optimizer is None:
            continue
        for place, (main, values) in enumerate(part.optimizer.state.items()):
            state[f"main {number}.{place}"] = main.detach().clone()
            for key, value in values.items():
                state[f"{key} {number}.{place}"] = torch.as_tensor(value).clone()
    return state


def unequal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names whose values are not the same bits."""
    names = sorted(first.keys() | second.keys())
    return [n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n])]


def plain_update(parts: Parts, loss: float) -> tuple[float, float, bool]:
    """`step.update` as it would be without the look at the norm: Megatron-Core's own step."""
    done, norm, _ = parts.optimizer.step()
    return loss, float(norm), not done


def trained(loaded: LoadedRun, steps: int, plain: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Gradient norms and final state after ``steps``, with our update or with Megatron-Core's own."""
    update = plain_update if plain else step.update
    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run, replaced(step, "update", update):
        norms = [step.train_step(run.parts, run.feed.next_step(), 1e-3).grad_norm for _ in range(steps)]
        return norms, state_of(run)


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """An attribute, for a while."""
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, plain)


@dataclass
class Poisoned:
    """changed: what a skipped step changed on this rank, by step. samples: its ids per step, by step."""

    changed: dict[int, list[str]] = field(default_factory=dict)
    samples: dict[int, list[str]] = field(default_factory=dict)
    skipped: int = 0
    error: str = ""
    printed: str = ""


def poisoned(loaded: LoadedRun, steps: tuple[int, ...], how: str, rank: int) -> Poisoned:
    """Train with a loss ("loss") or a gradient ("gradient") that is not finite on one rank in some steps."""
    seen = Poisoned()
    with contextlib.redirect_stdout(io.StringIO()) as printed, prepared(loaded) as run:
        plain_settle, plain_step = run.feed.settle, loop.train_step

        def settle(batches):
            batches = plain_settle(batches)
            seen.samples[run.phase.step] = [name for batch in batches for name in batch.sample_ids]
            return batches

        def train_step(parts, *args):
            hurt = run.phase.step in steps
            with replaced(step, "forward_backward", _hurting(how, parts.runtime.rank == rank and hurt)):
                before = state_of(run)
                result = plain_step(parts, *args)
            if hurt:
                seen.changed[run.phase.step] = unequal(before, state_of(run))
            return result

        run.feed.settle = settle
        with replaced(loop, "train_step", train_step):
            try:
                seen.skipped = loop.train(run, prepare.resume(run)).skipped
            except MegatronVLError as error:
                seen.error = f"{type(error).__name__}: {error}"
    seen.printed = printed.getvalue()
    return seen


def _hurting(how: str, hurt: bool) -> Callable:
    """`forward_backward` with a result that is not finite on this rank only."""
    plain = step.forward_backward

    def forward_backward(parts, *args, **keys):
        loss, tokens = plain(parts, *args, **keys)
        if hurt and how == "loss":
            loss = float("nan")
        if hurt and how == "gradient":
            for chunk in parts.chunks:
                for parameter in chunk.module.parameters():
                    parameter.main_grad.fill_(float("inf"))
        return loss, tokens

    return forward_backward
