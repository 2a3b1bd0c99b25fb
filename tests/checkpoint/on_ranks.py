"""What the ranks do for the tests of checkpoint/."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.config.schema import RunConfig
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parity.reference import Batches, micro_batches
from megatron_vl.train.build import build
from megatron_vl.train.step import evaluate_loss


def fresh_loss(config: RunConfig, batches: Batches, seed: int) -> tuple[float, int]:
    """(loss, tokens) of a model that was just drawn."""
    runtime = start(config.parallel, 1, choose_device("cpu"))
    parts = build(config, runtime, FreshWeights(config.model, seed), with_optimizer=False)
    return evaluate_loss(parts, micro_batches(batches, config.model, runtime.layout, runtime.rank))


def read_by_others(folder: str) -> dict[str, torch.Tensor]:
    """`model/a` and `model/b` of a checkpoint, read by torch and by Megatron-Core. One rank."""
    choose_device("cpu")
    whole = {"model/a": torch.zeros(10, 6)}
    dcp.load(whole, checkpoint_id=folder)
    plain = dist_checkpointing.load_plain_tensors(folder)
    shard = {
        "half": ShardedTensor.from_rank_offsets("model/a", torch.empty(5, 6), (0, 1, 2), replica_id=0),
    }
    half = dist_checkpointing.load(shard, folder, validate_access_integrity=False)["half"]
    return {
        "torch": whole["model/a"],
        "megatron": plain["model/a"],
        "megatron b": plain["model/b"],
        "megatron shard": half,
    }
