"""Megatron-Core's optimizer with our parameter groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.config.schema import OptimConfig


def _group(name: str, matches) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def parameter_groups(config: OptimConfig) -> dict[ParamKey, dict]:
    """Overrides per group: no weight decay on vectors (norms, biases, layer scales), a learning-rate multiplier
    for the vision part and for the projector."""
    groups = {_group("vectors", lambda p, name: p.dim() == 1): {"wd_mult": 0.0}}
    if config.vision_lr_scale != 1.0:
        groups[_group("vision", lambda p, name: "vision_model." in name)] = {
            "lr_mult": config.vision_lr_scale
        }
    if config.projector_lr_scale != 1.0:
        groups[_group("projector", lambda p, name: "projector." in name)] = {
            "lr_mult": config.projector_lr_scale
        }
    return groups


def build_optimizer(
    config: OptimConfig,
    chunks: Sequence[torch.nn.Module],
    dtype: torch.dtype,
    distributed: bool,
    tower: torch.nn.Module | None = None,
    copies: ProcessGroupCollection | None = None,
) -> MegatronOptimizer:
    """AdamW over the DDP-wrapped ``chunks``; fp32 main weights when the parameters are bf16.

    tower, copies: a DDP-wrapped module that all ranks hold whole, and the groups that its state is cut over.
    """
    assert config.optimizer == "adamw", config.optimizer
    options = OptimizerConfig(
        optimizer="adam",
        lr=1.0,  # set before every step from the schedule
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )
    groups = parameter_groups(config)
    optimizer = get_megatron_optimizer(
        options, list(chunks), config_overrides=groups, use_gloo_process_groups=False
    )
    if tower is None or not any(parameter.requires_grad for parameter in tower.parameters()):
        return optimizer
    beside = get_megatron_optimizer(
        options, [tower], config_overrides=groups, use_gloo_process_groups=False, pg_collection=copies
    )
    return ChainedOptimizer([*optimizer.chained_optimizers, *beside.chained_optimizers])


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Set every group's learning rate and weight decay for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
