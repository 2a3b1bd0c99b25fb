"""What the ranks of the shared world do for the tests of train/: `pretrain` without subprocesses."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from megatron_vl.checkpoint.progress import Progress
from megatron_vl.config.load import LoadedRun
from megatron_vl.data.batch import mask_documents
from megatron_vl.data.template import NOT_SCORED
from megatron_vl.errors import MegatronVLError
from megatron_vl.parallel.runtime import Phase, choose_device, start
from megatron_vl.train import loop, prepare
from megatron_vl.train.console import step_line
from megatron_vl.train.run import Run
from megatron_vl.train.score import score
from megatron_vl.train.step import StepResult, forward_backward, stage_inputs, train_step


@dataclass
class Trained:
    """What one rank saw. samples: its data-parallel rank's ids per step. printed: rank 0's console."""

    progress: Progress
    samples: list[list[str]] = field(default_factory=list)
    printed: str = ""


@contextmanager
def prepared(loaded: LoadedRun) -> Iterator[Run]:
    """A run on this rank of the world, closed at the end."""
    config = loaded.config
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    run = prepare.prepare(loaded, runtime, Phase())
    try:
        yield run
    finally:
        run.close()


def pretrain(loaded: LoadedRun) -> Trained:
    """`train.pretrain.train_on_rank` as far as it goes inside a world: prepare, resume, train."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, prepared(loaded) as run:
        samples: list[list[str]] = []
        plain = run.feed.settle

        def settle(loaded):
            batches = plain(loaded)
            samples.append([name for batch in batches for name in batch.sample_ids])
            return batches

        run.feed.settle = settle
        progress = loop.train(run, prepare.resume(run))
    return Trained(progress, samples, printed.getvalue())


def refused(loaded: LoadedRun, act: str = "resume") -> str:
    """The error of an act on this rank, `Class: message`; "" for none.

    act: resume, train, save, or "full disk on RANK". Only for errors that all ranks raise, or that come
    before the next collective.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
            if act in ("resume", "train"):
                progress = prepare.resume(run)
                if act == "train":
                    loop.train(run, progress)
            elif act == "save":
                save_now(run, Progress(1, 1))
            else:
                _save_with_full_disk(run, int(act.removeprefix("full disk on ")))
    except MegatronVLError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def save_now(run: Run, progress: Progress) -> None:
    """Save and wait for the end of it."""
    run.saver.begin(progress)
    run.saver.finish()


def _save_with_full_disk(run: Run, rank: int) -> None:
    plain = torch.save

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if run.parts.runtime.rank == rank:
        torch.save = full
    try:
        save_now(run, Progress(2, 2))
    finally:
        torch.save = plain


def greedy(loaded: LoadedRun) -> dict[str, list[int]]:
    """The most probable token at each scored position of data.eval, by sample id. One rank, whole logits.

    Nothing of `train/score.py` takes part.
    """
    guesses: dict[str, list[int]] = {}
    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
        model = run.parts.chunks[0].module.eval()
        for batches in run.eval_feed.loader:
            for batch in batches:
                with torch.no_grad():
                    logits = model.logits(stage_inputs(batch, torch.device("cpu")))
                best = logits.transpose(0, 1).argmax(dim=-1)
                for row, name in enumerate(batch.sample_ids):
                    if name:
                        guesses[name] = best[row][batch.labels[row] != NOT_SCORED].tolist()
    return guesses


def scored(loaded: LoadedRun, answers: dict[str, list[int]]) -> dict[str, bool]:
    """Exact match over data.eval with ``answers`` as the targets at the scored positions."""
    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
        feed, plain = run.eval_feed, run.eval_feed.next_step

        def next_step():
            batches = plain()
            for batch in batches:
                for row, name in enumerate(batch.sample_ids):
                    if answers.get(name):
                        batch.labels[row, batch.labels[row] != NOT_SCORED] = torch.tensor(answers[name])
            return batches

        feed.next_step = next_step
        return score(run.parts, feed)


@dataclass
class FirstStep:
    """One step: local decode failures, then what every rank agreed on, then the loss."""

    failed: list[str]
    masked: list[str]
    loss: float
    tokens: int
    grad_norm: float
    bad_samples: int


def first_step(loaded: LoadedRun, mask: tuple[str, ...] = ()) -> FirstStep:
    """Feed and train one step. mask: samples that are masked by the test rather than by a decode failure."""
    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
        batches = run.feed.next_step()
        failed = [view.record.id for batch in batches for view in batch.failed]
        batches = [
            mask_documents(b, [n for n, name in enumerate(b.sample_ids) if name in mask]) for b in batches
        ]
        masked = [
            name
            for batch in batches
            for name, learnt in zip(batch.sample_ids, (batch.labels != NOT_SCORED).any(dim=1).tolist())
            if not learnt
        ]
        result = train_step(run.parts, batches, 1e-3)
        return FirstStep(failed, masked, result.loss, result.tokens, result.grad_norm, run.feed.log.total)


def gradients_of_parts(loaded: LoadedRun, keep: str) -> dict[str, float]:
    """Largest gradient of tower, projector and decoder. One rank.

    Of all rows with images only ``keep`` is left to the loss: what reaches the tower comes through it.
    """
    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
        batches = run.feed.next_step()
        others = [
            mask_documents(b, [d for d in set(b.view_documents) if b.sample_ids[d] != keep]) for b in batches
        ]
        assert any(keep in batch.sample_ids for batch in batches)
        chunk = run.parts.chunks[0]
        chunk.train()
        chunk.zero_grad_buffer()
        forward_backward(run.parts, others)
        largest = {"vision_model": 0.0, "projector": 0.0, "language_model": 0.0}
        for name, weight in chunk.module.named_parameters():
            part = name.partition(".")[0]
            largest[part] = max(largest[part], weight.main_grad.abs().max().item())
    return largest


def disagreeing(loaded: LoadedRun, rank: int, other: str) -> str:
    """The error of the first step when ``rank`` reads the file ``other`` instead of data.train."""
    config = loaded.config
    runtime = start(config.parallel, config.train.seed, choose_device("cpu"))
    if runtime.rank == rank:
        config = replace(config, data=replace(config.data, train=[other]))
    with contextlib.redirect_stdout(io.StringIO()):
        run = prepare.prepare(replace(loaded, config=config), runtime, Phase())
        try:
            run.feed.next_step()
        except MegatronVLError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            run.close()
    return ""


@dataclass
class Measured:
    """What one rank measured of its first step.

    views: kinds of the views and lengths of the documents, per micro-batch. record: for metrics.jsonl.
    peak: FLOP/s that MFU is a share of. line: the console's.
    """

    views: list[tuple[list[int], list[int]]]
    record: dict[str, Any]
    peak: float
    line: str


def measured(loaded: LoadedRun) -> Measured:
    """Metrics of a step whose times and results the test knows: 0.5 s on the slowest rank, loss 1.5."""
    with contextlib.redirect_stdout(io.StringIO()), prepared(loaded) as run:
        batches, rank = run.feed.next_step(), run.parts.runtime.rank
        result = StepResult(loss=1.5, tokens=40, grad_norm=0.25)
        metrics = run.meter.measure(
            3, 1234567, 1e-3, result, batches, 0.5 / (1 + rank), 0.01 * (1 + rank), 2, 5
        )
        line = step_line(metrics, run.total_steps, on_cpu=True)
    return Measured([(b.view_kinds, b.doc_lengths) for b in batches], asdict(metrics), run.meter.peak, line)
