"""Everything a training loop needs, built once from the description of the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_vl.checkpoint.hf_load import HFCheckpoint
from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.checkpoint.live import Live
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.checkpoint.resume import choose, choose_first, restore
from megatron_vl.checkpoint.saver import Saver
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.config.changes import changed_keys
from megatron_vl.config.dump import to_yaml
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.load import LoadedRun
from megatron_vl.config.same_model import check_same_model
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.bad_samples import BadSampleLog
from megatron_vl.data.loader import eval_loader
from megatron_vl.data.training import is_planned, plan_ahead, sample_order, training_loader
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel.heartbeat import Phase
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.plan.budget import total_steps
from megatron_vl.plan.overlap import overlap_of
from megatron_vl.train.ahead import first_does
from megatron_vl.train.build import Parts, build
from megatron_vl.train.console import startup_report
from megatron_vl.train.feed import Feed, place_of
from megatron_vl.train.metrics import Meter, MetricsFile
from megatron_vl.train.run import Run


@dataclass(frozen=True)
class FirstWeights:
    """Where the first weights come from. source: released name -> whole tensor, None when a checkpoint is restored.

    dtypes: number formats under which they were released, None for fresh ones; an export goes back to them.
    """

    source: Callable[[str], torch.Tensor] | None
    dtypes: Mapping[str, str] | None


def first_weights(config: RunConfig, stored: Stored | None, runtime: Runtime) -> FirstWeights:
    """The checkpoint of the run, ``train.init_from``, ``train.init_from_hf``, or fresh ones from ``train.seed``."""
    if stored is not None:
        check_same_model(
            stored.model, config.model, f"{stored.folder / 'config.yaml'}", "use another run_dir"
        )
        return FirstWeights(None, stored.state.get("source_dtypes"))
    if config.train.init_from is not None:
        first = choose_first(config.train.init_from, config.checkpoint, runtime)
        where = f"{first.folder / 'config.yaml'}"
        remedy = "make the model of this run the same"
        check_same_model(first.model, config.model, where, remedy, may_extend=True)
        return FirstWeights(first.weight, first.state.get("source_dtypes"))
    if config.train.init_from_hf is None:
        return FirstWeights(FreshWeights(config.model, config.train.seed), None)
    folder = config.train.init_from_hf
    where, remedy = f"{folder}/config.json", f"set model_from: {folder}"
    check_same_model(model_from_hf(folder), config.model, where, remedy, may_extend=True)
    checkpoint = HFCheckpoint(folder)
    checkpoint.check(config.model)
    dtypes = {name: checkpoint.shape_and_dtype(name)[1] for name in checkpoint.files}
    return FirstWeights(checkpoint.tensor, dtypes)


def prepare(loaded: LoadedRun, runtime: Runtime, phase: Phase) -> Run:
    """Build model, optimizer, feeds and meters of this rank, and print the start-up report on rank 0."""
    config = loaded.config
    folder = Path(config.run_dir)
    first = runtime.rank == 0

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    phase.enter("looking for a checkpoint")
    stored = choose(folder / "checkpoints", config.checkpoint, runtime, say)
    phase.enter("building the model")
    first_weight = first_weights(config, stored, runtime)
    parts = build(config, runtime, first_weight.source)
    phase.enter("opening the data")
    batch = (config.train.micro_batch_size, config.train.global_batch_size)
    # below the collectives' limit: the rank whose storage stalls speaks first, not the peers that wait for it
    place, timeout = place_of(runtime), 0.8 * config.parallel.timeout_seconds
    steps = total_steps(config)
    log = BadSampleLog(str(folder / "bad_samples.jsonl"), write=first)
    if is_planned(config.data):
        folder.mkdir(parents=True, exist_ok=True)
        first_does(lambda report: plan_ahead(config, steps, runtime.layout.dp, report), runtime, phase, say)
    loader = training_loader(config, place, steps, timeout, log)
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
    chosen = to_yaml(resolved(config, parts))
    if first:
        write_resolved(folder, loaded, chosen)
    saver = Saver(folder / "checkpoints", config.checkpoint, live_parts(parts), chosen, say)
    saver.source_dtypes = first_weight.dtypes
    names = (parts.backend.name, parts.fused_kernels)
    say("\n".join(startup_report(loaded, runtime, *names, parts.dtype, meter.peak)))
    return Run(
        parts, Feed(loader, runtime, log), eval_feed, meter, None, say, folder, phase, steps, saver, stored
    )


def live_parts(parts: Parts) -> Live:
    """What a checkpoint holds of the parts."""
    placement = parts.config.parallel.vision_placement
    return Live(parts.config.model, placement, parts.runtime, parts.stages, parts.chunks, parts.optimizer)


def resolved(config: RunConfig, parts: Parts) -> RunConfig:
    """The configuration with ``auto`` replaced by what was chosen."""
    device, copies = parts.runtime.device.type, parts.runtime.layout.dp * parts.runtime.layout.cp
    overlap = overlap_of(config.parallel, copies, device == "cpu")
    parallel = replace(
        config.parallel,
        device=device,
        layer_backend=parts.backend.name,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
        fused_kernels="required" if parts.fused_kernels == "used" else "never",
    )
    params = "bf16" if parts.dtype == torch.bfloat16 else "fp32"
    return replace(config, parallel=parallel, precision=replace(config.precision, params=params))


def write_resolved(folder: Path, loaded: LoadedRun, chosen: str) -> None:
    """The resolved configuration beside the run's results, and the origin of each value."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(chosen)
    (folder / "origins.json").write_text(json.dumps(loaded.origins, indent=1) + "\n")


def resume(run: Run) -> Progress:
    """Continue from the checkpoint that was found in the run folder, or start at step 0.

    Raises:
        CheckpointError: the samples or their order are not those that the checkpoint was trained on.
    """
    run.phase.enter("resuming")
    parts, loader = run.parts, run.feed.loader
    data = sample_order(parts.config, loader)
    progress = Progress(0, 0, data)
    if run.stored is not None:
        progress = restore(run.stored, run.saver.live, parts.config.train.seed, run.say)
        if progress.data not in (data, ""):  # "": weights that were imported, not trained on anything here
            raise CheckpointError(
                f"{run.stored.folder} was trained on {progress.data}; it is now {data}: the sample order would "
                "change silently; use another run_dir, or the same files, data.seed, train.global_batch_size, mixture "
                "and packing"
            )
        progress = replace(progress, data=data)
        run.saver.last = progress
        for change in changed_keys(run.stored.config, resolved(parts.config, parts)):
            run.say(f"changed since the checkpoint was saved: {change}")
        run.say(f"resumed from {run.stored.folder}: step {progress.step}, {progress.tokens:,} tokens")
    loader.seek(progress.step)
    if parts.runtime.rank == 0:
        run.file = MetricsFile(run.folder / "metrics.jsonl", progress.step)
    sys.stdout.flush()
    return progress
