"""Start and stop a rank: device, process groups, seeds, and errors that name the rank.

``torchrun``, ``srun`` and ``--nproc`` all lead to ``start_from_environment``; tests and tools that keep a world
of local ranks alive call ``start`` inside one.
"""

from __future__ import annotations

import os
import random
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import ConfigError, MegatronVLError
from megatron_vl.parallel import cpu
from megatron_vl.parallel.heartbeat import Heartbeat, Phase
from megatron_vl.parallel.launch import HUNG, read_environment
from megatron_vl.plan.layout import Coords, Layout

NCCL_LATER_SECONDS = 60
GLOO_WORDS = (
    "gloo",
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)


@dataclass(frozen=True)
class Runtime:
    """This rank: its place in the layout, its groups, its device."""

    layout: Layout
    rank: int
    coords: Coords
    groups: Groups  # noqa: F821
    device: torch.device

    @property
    def name(self) -> str:
        """``rank 5 (dp0 pp1 cp0 tp1)``."""
        return self.layout.describe(self.rank)

    @property
    def is_first_stage(self) -> bool:
        return self.coords.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coords.pp == self.layout.pp - 1


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of ``parallel.device`` (auto, cpu, cuda); the CPU adapter is installed for ``cpu``.

    Raises:
        ConfigError: cuda is asked for and there is none, or cpu while CUDA devices are visible.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("parallel.device = cuda: no CUDA device is visible; use parallel.device=cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank}: only {torch.cuda.device_count()} CUDA device(s) on this node; "
                "start as many ranks per node as there are devices"
            )
        os.environ.setdefault(
            "CUDA_DEVICE_MAX_CONNECTIONS", "1"
        )  # Megatron-Core's overlap relies on the order
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    cpu.install()
    return torch.device("cpu")


def parameter_dtype(name: str, device: torch.device) -> torch.dtype:
    """``precision.params``: auto is bf16 on CUDA and fp32 on CPU."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def start(parallel: ParallelConfig, seed: int, device: torch.device) -> Runtime:
    """Groups and seeds of this rank; ``torch.distributed`` is already initialised.

    Every rank of a data-parallel replica's tensor-parallel group draws differently inside Megatron-Core's
    model-parallel RNG region and alike outside of it.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_vl.parallel.groups import make_groups

    layout = Layout.from_config(parallel, dist.get_world_size())
    rank = dist.get_rank()
    groups = make_groups(layout, collective_timeout(parallel, device))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=layout.coords(rank).tp, ep_rank=0, etp_rank=0)
    return Runtime(layout, rank, layout.coords(rank), groups, device)


def stop() -> None:
    """Leave Megatron-Core's groups; ``torch.distributed`` stays with whoever initialised it."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


@contextmanager
def start_from_environment(parallel: ParallelConfig, seed: int) -> Iterator[Runtime]:
    """A rank under torchrun, srun or ``--nproc``, shut down cleanly at the end.

    An error inside is printed with the rank's coordinates and phase by ``reported`` before it goes on, and the
    process group is not destroyed then: the destruction would wait for ranks that may be gone.
    """
    env = read_environment()
    device = choose_device(parallel.device, env.local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=collective_timeout(parallel, device))
    if env.world_size == 1:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=env.rank, world_size=env.world_size, timeout=timeout)
    runtime = start(parallel, seed, device)
    yield runtime
    dist.barrier()
    stop()
    dist.destroy_process_group()


def collective_timeout(parallel: ParallelConfig, device: torch.device) -> int:
    """Seconds that a collective may wait. NCCL aborts the process without a word: the heartbeat speaks first."""
    return parallel.timeout_seconds + (NCCL_LATER_SECONDS if device.type == "cuda" else 0)


@contextmanager
def reported(runtime: Runtime, phase: Phase, heartbeat: Heartbeat | None = None) -> Iterator[None]:
    """Print which rank failed in which phase, and which ranks the others wait for; then let the error go on.

    A collective that timed out ends the process with code 124, since ending in order would wait for the others.
    """
    try:
        yield
    except MegatronVLError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        lost, timed_out = collective_failed(error)
        if heartbeat is not None:
            heartbeat.state = "lost" if lost else "failed"
        lines = [f"{runtime.name} failed while {phase.name} at step {phase.step}: {first}"]
        if lost and heartbeat is not None:
            lines += heartbeat.suspects(hung=timed_out)
        if timed_out:
            lines.append(traceback.format_exc())
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        if timed_out:
            if heartbeat is not None:
                heartbeat.close()
            os._exit(HUNG)
        raise


def collective_failed(error: Exception) -> tuple[bool, bool]:
    """(it failed in a collective, and because of the time-out); gloo's errors are told apart by their texts only."""
    text = str(error)
    gloo = isinstance(error, RuntimeError) and any(words in text for words in GLOO_WORDS)
    lost = gloo or isinstance(error, dist.DistError)
    return lost, lost and any(words in text.lower() for words in ("timed out", "timeout"))
