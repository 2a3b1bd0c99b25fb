"""Rules between configuration keys. Each function returns ALL problems that it finds and raises nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vl.config.load import LoadedRun, load_run
from megatron_vl.config.mixture import DomainConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_vl.errors import Problem
from megatron_vl.plan.attention_checks import check_attention
from megatron_vl.plan.budget import total_tokens
from megatron_vl.plan.fp8 import check_fp8
from megatron_vl.plan.image_checks import check_dali, check_images
from megatron_vl.plan.kernel_checks import check_kernels
from megatron_vl.plan.mixture_checks import check_mixture, check_packing
from megatron_vl.plan.model_checks import check_model, check_token_ids, divides
from megatron_vl.plan.overlap import check_overlap
from megatron_vl.plan.recompute_checks import check_recompute
from megatron_vl.plan.rl_checks import check_rl
from megatron_vl.plan.sequence import row_multiple
from megatron_vl.plan.stages import check_stages

TP = "parallel.tensor_model_parallel_size"


def load_checked_run(
    path: str | None = None,
    overrides: Sequence[str] = (),
    model_from: str | None = None,
    world_size: int | None = None,
    to_train: bool = False,
    stage: Callable[[RunConfig], list[Problem]] | None = None,
) -> LoadedRun:
    """Reads a run and checks it: arguments as in `config.load.load_run` and `check_run`.

    to_train: also ask for what a training run needs. stage: rules of its stage (`plan.sft_checks`). Raises
    ConfigErrors with every problem at once.
    """

    def checks(config: RunConfig) -> list[Problem]:
        problems = check_run(config, world_size) + (check_ready_to_train(config) if to_train else [])
        return problems + (stage(config) if stage else [])

    return load_run(path, overrides, model_from, checks)


def check_run(config: RunConfig, world_size: int | None = None) -> list[Problem]:
    """Everything that makes the run impossible whatever its data. world_size None: the smallest."""
    if world_size is None:
        world_size = config.parallel.model_parallel_size
    return [
        *check_model(config.model),
        *check_layout(config.model, config.parallel, config.train, config.data, world_size),
        *check_recompute(config.model, config.parallel, config.recompute),
        *check_overlap(config.parallel),
        *check_fp8(config),
        *check_mixture(effective_domains(config.data), config.data.mixture),
        *_mixture_length(config),
        *check_packing(
            config.data.packing, config.parallel, config.data.seq_length, config.train.micro_batch_size
        ),
        *check_images(config.data, config.parallel),
        *check_attention(config.model.text, config.parallel, config.data.packing),
        *check_kernels(config.model.vision, config.parallel),
        *_overlong(config.data),
        *_device(config),
        *check_rl(config.rl),
        *_length_and_schedule(config),
    ]


def effective_domains(data: DataConfig) -> list[DomainConfig]:
    """``data.domains``, or ``data.train`` as the only one where there is a mixture of it."""
    if data.domains or not data.mixture:
        return data.domains
    return [DomainConfig("train", data.train or ["-"], weight=1.0)]


def _mixture_length(config: RunConfig) -> list[Problem]:
    """A mixture whose phases all have a length must last as long as the run."""
    lengths, needed = [phase.tokens for phase in config.data.mixture], total_tokens(config)
    if not lengths or None in lengths or needed is None or sum(lengths) >= needed:
        return []
    return [
        Problem(
            "data.mixture",
            sum(lengths),
            f"its phases have fewer tokens than the run, {needed}",
            "make a phase longer, or leave the tokens of the last one out",
        )
    ]


def check_layout(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, data: DataConfig, world_size: int
) -> list[Problem]:
    """Everything that does not divide over `world_size` ranks."""
    return [
        *_world(parallel, train, world_size),
        *_tensor_parallel(model, parallel),
        *check_stages(
            model.text.num_layers,
            parallel.pipeline_model_parallel_size,
            parallel.chunks_per_stage,
            parallel.pipeline_decoder_layers,
        ),
        *_pipeline(parallel, train, world_size),
        *_row_length(parallel, data),
    ]


def check_ready_to_train(config: RunConfig) -> list[Problem]:
    """What a training run needs beyond a possible layout: token ids, data, learning rate. Reads the disk."""
    data, train = config.data, config.train
    needed = (
        (
            "data.train",
            data.train or data.domains,
            "no training data",
            "list at least one JSONL file, or domains",
        ),
        ("data.tokenizer", data.tokenizer, "no tokenizer", "give a tokenizer.json or a SentencePiece .model"),
        ("schedule.phases", config.schedule.phases, "no learning rate", "give at least one phase"),
    )
    problems = [*check_token_ids(config.model), *check_dali(data)]
    problems += [Problem(path, value, rule, remedy) for path, value, rule, remedy in needed if not value]
    if train.eval_interval and not data.eval:
        problems.append(
            Problem(
                "data.eval",
                [],
                f"no evaluation data, but train.eval_interval = {train.eval_interval}",
                "list a JSONL file or set train.eval_interval 0",
            )
        )
    files = [("data.train", path) for path in data.train] + [("data.eval", path) for path in data.eval]
    files += [("data.tokenizer", data.tokenizer)] if data.tokenizer else []
    problems += [
        Problem(path, file, "no such file", "correct the path; relative paths start at the working directory")
        for path, file in files
        if not Path(file).is_file()
    ]
    problems += [
        Problem(f"data.domains[{number}].paths", path, "no such file or folder", "correct the path")
        for number, domain in enumerate(data.domains)
        for path in domain.paths
        if not Path(path).exists() and not Path(path + ".bin").is_file()  # Megatron's files go by their stem
    ]
    problems += [
        Problem(
            f"data.domains[{number}].action_schema",
            domain.action_schema,
            "format gui needs the file that lists its actions",
            "name one, e.g. a copy of megatron_vl/data/sources/gui_actions.json",
        )
        for number, domain in enumerate(data.domains)
        if domain.format == "gui" and not (domain.action_schema and Path(domain.action_schema).is_file())
    ]
    if data.train and data.domains:
        problems.append(
            Problem(
                "data.train", data.train, "stands beside data.domains", "make its files a domain, or empty it"
            )
        )
    folders = {
        "data.data_root": data.data_root,
        "train.init_from_hf": train.init_from_hf,
        "train.init_from": train.init_from,
    }
    if train.init_from is not None and train.init_from_hf is not None:
        problems.append(
            Problem(
                "train.init_from",
                train.init_from,
                f"train.init_from_hf = {train.init_from_hf} is set as well",
                "keep one source of the first weights",
            )
        )
    problems += [
        Problem(
            path, folder, "no such folder", "correct the path; relative paths start at the working directory"
        )
        for path, folder in folders.items()
        if folder is not None and not Path(folder).is_dir()
    ]
    return problems


def _world(parallel: ParallelConfig, train: TrainConfig, world_size: int) -> Iterator[Problem]:
    copy = parallel.model_parallel_size
    if world_size < 1 or world_size % copy:
        axes = " x ".join(
            f"{name}{size}"
            for name, size in (
                ("TP", parallel.tensor_model_parallel_size),
                ("CP", parallel.context_parallel_size),
                ("PP", parallel.pipeline_model_parallel_size),
            )
        )
        above = max(world_size // copy + 1, 1) * copy
        near = f"{above - copy} or {above}" if above > copy else f"{copy}"
        yield Problem(
            "world size", world_size, f"must be a multiple of {axes} = {copy}", f"start {near} ranks"
        )
        return
    replicas = world_size // copy
    rows = train.micro_batch_size * replicas
    if train.global_batch_size % rows:
        below = train.global_batch_size // rows * rows
        yield Problem(
            "train.global_batch_size",
            train.global_batch_size,
            f"must be a multiple of train.micro_batch_size {train.micro_batch_size} x {replicas} "
            f"data-parallel "
            f"replicas = {rows}",
            f"choose {below} or {below + rows}" if below else f"choose {rows}",
        )


def _tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    size, text, vision = parallel.tensor_model_parallel_size, model.text, model.vision
    yield from divides(
        TP,
        size,
        {
            "model.text.num_attention_heads": text.num_attention_heads,
            "model.text.ffn_hidden_size": text.ffn_hidden_size,
        },
    )
    groups = text.num_query_groups
    if groups % size and size % groups:
        yield Problem(
            TP,
            size,
            f"must be a divisor or a multiple of model.text.num_query_groups = {groups} "
            f"(Megatron-Core's rule)",
            "choose another size",
        )
    if parallel.vision_placement == "tensor":
        yield from divides(
            TP,
            size,
            {
                "model.vision.num_attention_heads": vision.num_attention_heads,
                "model.vision.hidden_size": vision.hidden_size,
                "model.vision.ffn_hidden_size": vision.ffn_hidden_size,
                "model.text.hidden_size": text.hidden_size,
            },
            ' with parallel.vision_placement "tensor" ("data" has no such rule)',
        )
    if parallel.sequence_parallel and size == 1:
        yield Problem(
            "parallel.sequence_parallel",
            True,
            f"has nothing to shard with {TP} = 1",
            f"set it false, or {TP} to 2 or more",
        )


def _pipeline(parallel: ParallelConfig, train: TrainConfig, world_size: int) -> Iterator[Problem]:
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.chunks_per_stage
    if virtual == 1:
        return
    path = "parallel.virtual_pipeline_model_parallel_size"
    if stages == 1:
        yield Problem(
            path,
            virtual,
            "interleaving needs parallel.pipeline_model_parallel_size of at least 2",
            "remove it or use more stages",
        )
        return
    if world_size < 1 or world_size % parallel.model_parallel_size:
        return
    rows = train.micro_batch_size * world_size // parallel.model_parallel_size
    microbatches, rest = divmod(train.global_batch_size, rows)
    if rest == 0 and microbatches % stages:
        yield Problem(
            "train.global_batch_size",
            train.global_batch_size,
            f"gives {microbatches} micro-batches per step; the interleaved schedule needs a multiple of "
            f"parallel.pipeline_model_parallel_size = {stages}",
            f"choose a multiple of {rows * stages}",
        )


def _row_length(parallel: ParallelConfig, data: DataConfig) -> Iterator[Problem]:
    multiple = row_multiple(
        parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.sequence_parallel
    )
    if data.seq_length % multiple:
        reasons = []
        if parallel.context_parallel_size > 1:
            reasons.append(f"2 x context_parallel_size {parallel.context_parallel_size}")
        if parallel.sequence_parallel:
            reasons.append(
                f"tensor_model_parallel_size {parallel.tensor_model_parallel_size} (sequence_parallel)"
            )
        above = (data.seq_length // multiple + 1) * multiple
        below = f"{above - multiple} or " if above > multiple else ""
        yield Problem(
            "data.seq_length",
            data.seq_length,
            f"must be a multiple of {' x '.join(reasons)} = {multiple}",
            f"choose {below}{above}",
        )


def _overlong(data: DataConfig) -> Iterator[Problem]:
    if data.packing.overlong == "split_turns" and data.loss_on == "assistant_last":
        yield Problem(
            "data.packing.overlong",
            "split_turns",
            "with data.loss_on = assistant_last only the last piece of a conversation may be learnt from",
            "choose refuse, or data.loss_on assistant",
        )


def _device(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.device == "cpu" and config.parallel.layer_backend == "transformer_engine":
        yield Problem(
            "parallel.layer_backend",
            "transformer_engine",
            "needs a CUDA device, but parallel.device = cpu",
            "set parallel.layer_backend torch",
        )


def _length_and_schedule(config: RunConfig) -> Iterator[Problem]:
    train, schedule = config.train, config.schedule
    if train.train_steps is not None and train.train_tokens is not None:
        yield Problem(
            "train.train_tokens",
            train.train_tokens,
            f"stands beside train.train_steps = {train.train_steps}",
            "keep one of the two",
        )
    for index, phase in enumerate(schedule.phases):
        if phase.style == "constant" and phase.lr_start != phase.lr_end:
            yield Problem(
                f"schedule.phases[{index}].lr_end",
                phase.lr_end,
                f"differs from lr_start = {phase.lr_start} in a constant phase",
                "make them equal or choose linear",
            )
    first: Any = schedule.phases[0].tokens if schedule.phases else None
    if first is not None and schedule.warmup_tokens > first:
        yield Problem(
            "schedule.warmup_tokens",
            schedule.warmup_tokens,
            f"is longer than the first phase of {first} tokens",
            "shorten it or lengthen the phase",
        )
