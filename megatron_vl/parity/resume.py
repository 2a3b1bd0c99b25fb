"""Does a run that stops in one layout and goes on in another have the curve of one that never stopped?

The whole pre-training path runs: samples, rows, step, schedule, background saving, restoring. One run per first
layout trains BEFORE + AFTER steps and saves after BEFORE on its way, so the checkpoint is also proof that saving
while training goes on keeps the moment at which it began. Each second layout continues from a copy of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.config.load import LoadedRun
from megatron_vl.parallel.runtime import Phase, choose_device, start
from megatron_vl.parallel.world import LocalWorld, RankFailed
from megatron_vl.parity.layouts import parse_layout
from megatron_vl.plan.checks import load_checked_run

BEFORE, AFTER = 4, 5
TOLERANCE = 1e-5
# (first layout, second layout): sizes as in check_parity, "/tensor" for the sharded tower, "/all" for one on every
# stage, "/plain" for an optimizer that is not distributed. Every axis grows and shrinks, alone and with others.
PAIRS = (
    ("1", "tp2pp2cp2sp"), ("tp2pp2cp2sp", "1"), ("tp2", "pp2"), ("pp4", "tp4sp"), ("tp4sp", "dp4"),
    ("pp2vpp2", "pp4"), ("pp4", "pp2vpp2"), ("dp8", "dp2"), ("dp2", "cp4"), ("cp2", "dp8"),
    ("dp2tp2pp2", "pp2cp2"), ("dp2cp2tp2sp", "tp2pp2vpp2"), ("tp4/tensor", "tp2"), ("tp2", "tp4sp/tensor"),
    ("dp2tp2pp2/tensor", "dp2cp2tp2sp"), ("dp4/plain", "dp2tp2"), ("dp2tp2", "tp2pp2/plain"),
    ("tp2spcp2", "dp2tp2pp2/tensor"), ("tp2pp2/all", "dp2"), ("dp2tp2", "pp4/all"), ("pp2vpp2/all", "tp2pp2/tensor"),
)  # fmt: skip


@dataclass(frozen=True)
class End:
    """One side of a pair."""

    name: str
    ranks: int
    overrides: tuple[str, ...]


@dataclass
class Compared:
    """One line of the table. loss, grad_norm: largest relative difference over the steps after the change."""

    first: str
    second: str
    status: str
    loss: float = math.nan
    grad_norm: float = math.nan
    lr_equal: bool = False
    samples_equal: bool = False
    seconds: float = 0.0
    rule: str = ""


def end(name: str, device: str = "cpu") -> End:
    """``tp2pp2/tensor`` -> its keys.

    Raises:
        ConfigError: a part of the name is unknown.
    """
    layout, *marks = name.split("/")
    placement = next((mark for mark in marks if mark in ("tensor", "all")), "data")
    parsed = parse_layout(layout, placement, device)
    p = parsed.parallel
    keys = [
        f"parallel.tensor_model_parallel_size={p.tensor_model_parallel_size}",
        f"parallel.pipeline_model_parallel_size={p.pipeline_model_parallel_size}",
        f"parallel.context_parallel_size={p.context_parallel_size}",
        f"parallel.sequence_parallel={str(p.sequence_parallel).lower()}",
        f"parallel.vision_placement={placement}",
        f"parallel.use_distributed_optimizer={str('plain' not in marks).lower()}",
        f"parallel.virtual_pipeline_model_parallel_size={p.virtual_pipeline_model_parallel_size or 'none'}",
        f"parallel.device={device}",
    ]
    return End(name, parsed.world_size, tuple(keys))


def train_on_rank(loaded: LoadedRun, fault: Callable[[object], None] | None = None) -> list[list[str]]:
    """Be one rank of a run that starts or resumes; the ids of its samples, step by step.

    fault: changes the run after it has resumed; only the tests of this check have one.
    """
    from megatron_vl.train.loop import train
    from megatron_vl.train.prepare import prepare, resume

    config = loaded.config
    runtime = start(config.parallel, config.train.seed, choose_device(config.parallel.device))
    seen: list[list[str]] = []
    with contextlib.redirect_stdout(io.StringIO()):
        run = prepare(loaded, runtime, Phase())
        plain = run.feed.settle

        def settle(batches):
            seen.append([name for batch in batches for name in batch.sample_ids])
            return plain(batches)

        run.feed.settle = settle
        progress = resume(run)
        if fault is not None:
            fault(run)
        train(run, progress)
        run.close()
    return seen


class Matrix:
    """Runs pairs in a kept world of local ranks. config: YAML of the run. folder: for the runs of the check."""

    def __init__(self, world: LocalWorld, config: Path, folder: Path, overrides: Sequence[str] = ()) -> None:
        self.world, self.config, self.folder, self.overrides = world, config, folder, tuple(overrides)
        self._first: dict[str, list[list[str]]] = {}

    def loaded(self, side: End, run_dir: Path) -> LoadedRun:
        """The checked description of a run of BEFORE + AFTER steps that saves after BEFORE.

        Raises:
            ConfigErrors: the layout does not fit the model.
        """
        keys = [
            *self.overrides, *side.overrides, f"run_dir={run_dir}", f"train.train_steps={BEFORE + AFTER}",
            f"checkpoint.save_interval={BEFORE}", "checkpoint.save_at_end=false",
        ]  # fmt: skip
        return load_checked_run(str(self.config), keys, None, side.ranks, to_train=True)

    def compare(self, first: str, second: str, fault: Callable | None = None) -> Compared:
        """Continue ``first``'s checkpoint in ``second`` and compare every step with ``first``'s own."""
        begin = time.perf_counter()
        try:
            whole = self._uninterrupted(end(first))
            run_dir = self.folder / f"{first}-{second}".replace("/", "_")
            shutil.rmtree(run_dir, ignore_errors=True)
            name = f"checkpoints/step_{BEFORE:08d}"
            shutil.copytree(self._run_dir(end(first)) / name, run_dir / name)
            side = end(second)
            seen = self.world.run(side.ranks, train_on_rank, self.loaded(side, run_dir), fault)
        except RankFailed as error:
            return Compared(first, second, "failed", rule=str(error), seconds=time.perf_counter() - begin)
        expected = [r for r in records(self._run_dir(end(first))) if r["step"] > BEFORE]
        found = records(run_dir)
        result = Compared(first, second, "ok")
        steps_equal = [r["step"] for r in found] == [r["step"] for r in expected]
        if steps_equal:
            result.loss = largest(expected, found, "loss")
            result.grad_norm = largest(expected, found, "grad_norm")
            result.lr_equal = [r["lr"] for r in found] == [r["lr"] for r in expected]
        result.samples_equal = samples_by_step(seen) == samples_by_step(whole)[BEFORE:]
        good = result.loss <= TOLERANCE and result.grad_norm <= TOLERANCE
        if not (steps_equal and good and result.lr_equal and result.samples_equal):
            result.status = "failed"
        result.seconds = time.perf_counter() - begin
        return result

    def _run_dir(self, side: End) -> Path:
        return self.folder / side.name.replace("/", "_")

    def _uninterrupted(self, side: End) -> list[list[str]]:
        """Sample ids by rank of the run in the first layout, run once per layout."""
        if side.name not in self._first:
            shutil.rmtree(self._run_dir(side), ignore_errors=True)
            loaded = self.loaded(side, self._run_dir(side))
            self._first[side.name] = self.world.run(side.ranks, train_on_rank, loaded)
        return self._first[side.name]

    def all(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Compared]:
        """The table, line by line."""
        for first, second in pairs:
            yield self.compare(first, second)


def records(run_dir: Path) -> list[dict]:
    """The steps of a run's metrics."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r]


def largest(expected: Sequence[dict], found: Sequence[dict], name: str) -> float:
    """Largest relative difference of a metric over the steps."""
    return max(abs(f[name] - e[name]) / abs(e[name]) for e, f in zip(expected, found, strict=True))


def samples_by_step(seen: Sequence[Sequence[Sequence[str]]]) -> list[list[str]]:
    """The samples of each global batch, sorted, each once: ranks of one replica have seen the same ones."""
    return [sorted({name for rank in seen for name in rank[step]}) for step in range(len(seen[0]))]
