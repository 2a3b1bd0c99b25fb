"""Start and stop a rank: device, process groups, seeds, and errors that name the rank.

``torchrun``, ``srun`` and ``--nproc`` all lead to ``start_from_environment``; tests and tools that keep a world
of local ranks alive call ``start`` inside one.
"""

from __future__ import annotations

import os
import random
import sys
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
from megatron_vl.plan.layout import Coords, Layout


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


@dataclass(frozen=True)
class Environment:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int


def read_environment() -> Environment:
    """Rank and world size from torchrun's or Slurm's variables; one rank when there are none.

    Raises:
        ConfigError: a launcher is there but its variables are incomplete.
    """
    env = os.environ
    if "RANK" in env:
        missing = [k for k in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in env]
        if missing:
            raise ConfigError(
                f"RANK={env['RANK']} is set but {', '.join(missing)} is not: start with torchrun or --nproc"
            )
        return Environment(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in env]
        if missing:
            raise ConfigError(
                f"under srun {' and '.join(missing)} must be exported, e.g. MASTER_ADDR=$(scontrol show hostnames "
                "$SLURM_JOB_NODELIST | head -1) MASTER_PORT=29500"
            )
        return Environment(
            int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
        )
    return Environment(0, 1, 0)


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
    groups = make_groups(layout, parallel.timeout_seconds)
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
    timeout = timedelta(seconds=parallel.timeout_seconds)
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


@contextmanager
def reported(runtime: Runtime, phase: Phase) -> Iterator[None]:
    """Print which rank failed in which phase, then let the error go on."""
    try:
        yield
    except MegatronVLError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(
            f"{runtime.name} failed while {phase.name} at step {phase.step}: {first}",
            file=sys.stderr,
            flush=True,
        )
        raise


@dataclass
class Phase:
    """What a rank is doing, for error messages."""

    name: str = "starting"
    step: int = 0
