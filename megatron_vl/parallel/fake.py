"""One rank of a layout alone: process groups that answer at once and move nothing.

For measuring what a single rank computes and holds in a layout of any size (`fake_ranks`), and for building it without
memory on any machine (`described_rank`). Whatever comes from another rank is whatever was in the memory, so losses mean
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.runtime import Runtime, choose_device, start, stop
from megatron_vl.parallel.shapes import META, ShapesOnly


@contextmanager
def fake_ranks(parallel: ParallelConfig, seed: int, rank: int, world_size: int) -> Iterator[Runtime]:
    """Be ``rank`` of ``world_size`` ranks of which the others do not exist.

    Raises:
        ConfigError: there is no such rank.
    """
    with _alone(parallel, seed, rank, world_size, choose_device(parallel.device)) as runtime:
        yield runtime


@contextmanager
def described_rank(
    parallel: ParallelConfig, seed: int, rank: int, world_size: int
) -> Iterator[tuple[Runtime, ShapesOnly]]:
    """The same without memory: the device is ``meta``, and inside, floats have shapes only (`parallel/shapes.py`).

    parallel: `parallel.device` does not count. One rank can be built after the other in one process.

    Raises:
        ConfigError: there is no such rank.
    """
    choose_device("auto")  # where there is no GPU, Megatron-Core's calls of CUDA must lead somewhere
    with ExitStack() as stack:
        runtime = stack.enter_context(_alone(parallel, seed, rank, world_size, META))
        stack.enter_context(patch.object(torch.cuda, "current_device", lambda: META))
        for name in ("tensor", "as_tensor"):  # on meta they would drop the values of integers
            stack.enter_context(patch.object(torch, name, _with_values(getattr(torch, name))))
        stack.enter_context(patch.object(torch.Tensor, "type", _named_as_cuda(torch.Tensor.type)))
        yield runtime, stack.enter_context(ShapesOnly())


@contextmanager
def _alone(
    parallel: ParallelConfig, seed: int, rank: int, world_size: int, device: torch.device
) -> Iterator[Runtime]:
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"fake rank = {rank}: a layout of {world_size} ranks has ranks 0 to {world_size - 1}"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    with patch.dict(dist.Backend.backend_capability, fake=["cpu", "cuda", "meta"]):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            with (
                # the backend's own refuses to send nothing and to receive something
                patch.object(dist, "all_to_all_single", _nothing),
                patch.object(dist, "new_group", _own_groups(dist.new_group, rank)),
            ):
                yield start(parallel, seed, device)
        finally:
            stop()
            dist.destroy_process_group()


def _own_groups(new_group: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """``new_group`` that makes those groups alone that have this rank: of 1,024 ranks there are thousands."""

    def make(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks, *args, **kwargs)

    return make


def _nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


def _with_values(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory on the CPU in the place of ``meta``; what has floats loses its memory again in `ShapesOnly`. It would
    read tensors among the numbers by a way that `ShapesOnly` does not see."""

    def make(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == META:
            kwargs["device"] = "cpu"
        return factory(_numbers(data) if isinstance(data, (list, tuple)) else data, *args, **kwargs)

    return make


def _numbers(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return [_numbers(one) for one in data]
    return data.item() if isinstance(data, torch.Tensor) and data.is_meta else data


def _named_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type()``: Megatron-Core's optimizers compare with the names of CUDA tensors."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if self.is_meta and isinstance(answer, str):
            return "torch.cuda." + answer.rpartition(".")[2]
        return answer

    return type_
