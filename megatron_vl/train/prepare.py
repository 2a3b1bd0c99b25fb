"""Everything a training loop needs, built once from the description of the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vl.checkpoint.hf_load import HFCheckpoint
from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.checkpoint.saved import Progress, newest, restore
from megatron_vl.config.dump import to_yaml
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.load import LoadedRun
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.bad_samples import BadSampleLog
from megatron_vl.data.loader import Loader, eval_loader, train_loader
from megatron_vl.errors import CheckpointError, Problem, raise_if_any
from megatron_vl.parallel.runtime import Phase, Runtime
from megatron_vl.plan.budget import total_steps
from megatron_vl.train.build import Parts, build
from megatron_vl.train.console import startup_report
from megatron_vl.train.feed import Feed, place_of
from megatron_vl.train.loop import Run
from megatron_vl.train.metrics import Meter, MetricsFile

# Fields that only say how fresh weights are drawn or how long rows are meant to be.
NOT_COMPUTED = {"layer_scale_init", "init_method_std", "max_position_embeddings"}


def weight_source(config: RunConfig) -> Callable[[str], torch.Tensor]:
    """Where the first weights come from: ``train.init_from_hf``, or fresh ones from ``train.seed``."""
    if config.train.init_from_hf is None:
        return FreshWeights(config.model, config.train.seed)
    check_same_model(config.train.init_from_hf, config.model)
    checkpoint = HFCheckpoint(config.train.init_from_hf)
    checkpoint.check(config.model)
    return checkpoint.tensor


def check_same_model(directory: str, model: ModelConfig) -> None:
    """Refuse weights whose config.json describes another model: shapes alone do not show a wrong rope base.

    Raises:
        ConfigErrors: every field that differs and shapes the computation.
    """
    theirs, problems = model_from_hf(directory), []
    for part in ("vision", "text", "tokens"):
        here, there = getattr(model, part), getattr(theirs, part)
        for field in fields(here):
            ours, other = getattr(here, field.name), getattr(there, field.name)
            if ours != other and field.name not in NOT_COMPUTED:
                rule = f"{directory}/config.json says {other}"
                problems.append(
                    Problem(f"model.{part}.{field.name}", ours, rule, f"set model_from: {directory}")
                )
    raise_if_any(problems)


def prepare(loaded: LoadedRun, runtime: Runtime, phase: Phase) -> Run:
    """Build model, optimizer, feeds and meters of this rank, and print the start-up report on rank 0."""
    config = loaded.config
    folder = Path(config.run_dir)
    first = runtime.rank == 0

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    phase.name = "building the model"
    parts = build(config, runtime, weight_source(config))
    phase.name = "opening the data"
    batch = (config.train.micro_batch_size, config.train.global_batch_size)
    # below the collectives' limit: the rank whose storage stalls speaks first, not the peers that wait for it
    place, timeout = place_of(runtime), 0.8 * config.parallel.timeout_seconds
    steps = total_steps(config)
    loader = train_loader(config.data, config.model, place, *batch, num_steps=steps, timeout_seconds=timeout)
    log = BadSampleLog(str(folder / "bad_samples.jsonl"), write=first)
    eval_feed = None
    if config.train.eval_interval:
        evaluation = eval_loader(
            config.data,
            config.model,
            place,
            *batch,
            num_samples=config.train.eval_samples,
            timeout_seconds=timeout,
        )
        eval_feed = Feed(evaluation, runtime, BadSampleLog(str(folder / "bad_samples.jsonl"), write=first))
    meter = Meter(config, runtime, steps)
    if first:
        write_resolved(folder, loaded, parts)
    say("\n".join(startup_report(loaded, runtime, parts.backend.name, parts.dtype, meter.peak)))
    return Run(parts, Feed(loader, runtime, log), eval_feed, meter, None, say, folder, phase, steps)


def sample_order(config: RunConfig, loader: Loader) -> str:
    """What decides which samples step k trains on; it must not change when a run is resumed."""
    files = [
        f"{f['path']} ({f['samples']} samples, {f['bytes']} bytes)"
        for f in loader.micro_batches.source.describe()
    ]
    return f"{', '.join(files)} with seed {config.data.seed} and {config.train.global_batch_size} rows a step"


def _agreed_newest(run: Run) -> Path | None:
    """The checkpoint that rank 0 finds, the same on every rank.

    Raises:
        CheckpointError: this rank does not see it, or rank 0 finds a broken folder (raised on every rank).
    """
    folder = run.folder / "checkpoints"
    checkpoint, problem = None, ""
    if run.parts.runtime.rank == 0:
        try:
            checkpoint = newest(folder)
        except CheckpointError as error:
            problem = str(error)  # told to the others first: they would wait for ever
    found = [checkpoint, problem]
    dist.broadcast_object_list(found, src=0)
    checkpoint, problem = found
    if problem:
        raise CheckpointError(problem)
    if checkpoint is not None and not (checkpoint / "meta.json").is_file():
        name = run.parts.runtime.name
        raise CheckpointError(
            f"{name} cannot see {checkpoint}: run_dir must be on a file system that all nodes share"
        )
    return checkpoint


def write_resolved(folder: Path, loaded: LoadedRun, parts: Parts) -> None:
    """The resolved configuration beside the run's results: ``auto`` replaced by what was chosen, and each origin."""
    chosen = replace(
        loaded.config,
        parallel=replace(
            loaded.config.parallel, device=parts.runtime.device.type, layer_backend=parts.backend.name
        ),
        precision=replace(
            loaded.config.precision, params="bf16" if parts.dtype == torch.bfloat16 else "fp32"
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(chosen))
    (folder / "origins.json").write_text(json.dumps(loaded.origins, indent=1) + "\n")


def resume(run: Run) -> Progress:
    """Continue from the newest checkpoint of the run folder, or start at step 0.

    Raises:
        CheckpointError: the samples or their order are not those that the checkpoint was trained on.
    """
    run.phase.name = "resuming"
    parts, loader = run.parts, run.feed.loader
    data = sample_order(parts.config, loader)
    checkpoint = _agreed_newest(run)
    progress = Progress(0, 0, data)
    if checkpoint is not None:
        progress = restore(checkpoint, parts.runtime, parts.chunks, parts.optimizer)
        if progress.data != data:
            raise CheckpointError(
                f"{checkpoint} was trained on {progress.data}; it is now {data}: the sample order would change "
                "silently; use another run_dir, or the same files, data.seed and train.global_batch_size"
            )
        run.say(f"resumed from {checkpoint}: step {progress.step}, {progress.tokens:,} tokens")
    loader.seek(progress.step)
    if parts.runtime.rank == 0:
        run.file = MetricsFile(run.folder / "metrics.jsonl", progress.step)
    sys.stdout.flush()
    return progress
