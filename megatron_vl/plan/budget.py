"""How many micro-batches make a step and how many steps make a run."""

from __future__ import annotations

from megatron_vl.config.schema import RunConfig, TrainConfig


def tokens_per_step(config: RunConfig) -> int:
    """Row tokens of one optimizer step, padding included: global batch x sequence length."""
    return config.train.global_batch_size * config.data.seq_length


def num_microbatches(train: TrainConfig, data_parallel: int) -> int:
    """Micro-batches that each data-parallel rank runs per step. The batch must divide (`plan.checks`)."""
    return train.global_batch_size // (train.micro_batch_size * data_parallel)


def total_tokens(config: RunConfig) -> int | None:
    """Row tokens of the run: `train_steps` or `train_tokens`, else the schedule, else None."""
    if config.train.train_steps is not None:
        return config.train.train_steps * tokens_per_step(config)
    return config.train.train_tokens or config.schedule.total_tokens or None


def total_steps(config: RunConfig) -> int | None:
    """Optimizer steps of the run, the last one rounded up; None when the run has no length yet."""
    if config.train.train_steps is not None:
        return config.train.train_steps
    tokens = total_tokens(config)
    return None if tokens is None else -(-tokens // tokens_per_step(config))
