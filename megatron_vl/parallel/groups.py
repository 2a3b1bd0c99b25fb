"""The process groups of a rank, handed down to whoever communicates."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.plan.layout import Layout


@dataclass(frozen=True)
class Groups:
    """megatron: what Megatron-Core's parts take. tp_cp: the ranks that hold one micro-batch on a pipeline stage, tensor
    fastest; they share out its views. replica: all ranks of one data-parallel replica, tensor fastest, then context,
    then pipeline. alone: this rank only. world: all ranks.
    """

    megatron: ProcessGroupCollection
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    tp_cp: dist.ProcessGroup
    replica: dist.ProcessGroup
    alone: dist.ProcessGroup
    world: dist.ProcessGroup

    def of_copies(self) -> ProcessGroupCollection:
        """What Megatron-Core's DDP and optimizer take for weights that every rank of the world holds whole.

        Data parallelism over all ranks: gradients are summed over all of them, and the distributed optimizer cuts its
        state in as many pieces. Norms are added up over the same group as those of the pipeline's weights.
        """
        alone, world = self.alone, self.world
        return ProcessGroupCollection(
            tp=alone, cp=alone, pp=alone, ep=alone, expt_dp=alone, tp_ep_pp=alone, mp=self.megatron.mp, dp=world,
            dp_cp=world, intra_dist_opt=parallel_state.get_intra_distributed_optimizer_instance_group(),
        )  # fmt: skip


def make_groups(layout: Layout, timeout_seconds: int) -> Groups:
    """Initialise Megatron-Core's parallel state and collect the groups; called by every rank."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=timeout_seconds / 60,
        create_gloo_process_groups=False,
    )
    megatron = ProcessGroupCollection.use_mpu_process_groups()
    rank = dist.get_rank()
    timeout = timedelta(seconds=timeout_seconds)  # new_group does not take over that of the world: 30 minutes
    alone = dist.new_group([rank], timeout=timeout, use_local_synchronization=True)
    replicas: list[list[int]] = [[] for _ in range(layout.dp)]
    for one in range(layout.world_size):
        replicas[layout.coords(one).dp].append(one)
    replica = [dist.new_group(ranks, timeout=timeout) for ranks in replicas][layout.coords(rank).dp]
    return Groups(
        megatron=megatron,
        tp=megatron.tp,
        cp=megatron.cp,
        pp=megatron.pp,
        dp=megatron.dp,
        dp_cp=megatron.dp_cp,
        tp_cp=megatron.tp_cp,
        replica=replica,
        alone=alone,
        world=dist.group.WORLD,
    )
