"""One rank of a layout alone: process groups that answer at once and move nothing.

For measuring what a single rank computes and holds in a layout of any size. Whatever comes from another rank is
whatever was in the memory, so losses mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.runtime import Runtime, choose_device, start, stop


@contextmanager
def fake_ranks(parallel: ParallelConfig, seed: int, rank: int, world_size: int) -> Iterator[Runtime]:
    """Be ``rank`` of ``world_size`` ranks of which the others do not exist.

    Raises:
        ConfigError: there is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"fake rank = {rank}: a layout of {world_size} ranks has ranks 0 to {world_size - 1}"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    device = choose_device(parallel.device)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    exchange = dist.all_to_all_single
    dist.all_to_all_single = _nothing  # the backend's own refuses to send nothing and to receive something
    try:
        yield start(parallel, seed, device)
        stop()
    finally:
        dist.all_to_all_single = exchange
        dist.destroy_process_group()


def _nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs
