"""Rules of `data.image_mode` and `data.image_backend`. Each function returns ALL problems and raises nothing."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_vl.config.schema import DataConfig, ParallelConfig
from megatron_vl.errors import Problem


def check_images(data: DataConfig, parallel: ParallelConfig | None = None) -> list[Problem]:
    """What cannot be had on any machine. parallel None: where the model runs is not known."""
    if data.image_backend != "dali":
        return []
    problems = []
    if data.dali_device == "mixed" and data.image_mode == "exact":
        problems.append(
            Problem(
                "data.dali_device",
                "mixed",
                "decodes JPEG by nvJPEG, which rounds otherwise than the released processing, so it keeps the "
                "tolerance of data.image_mode = fast only",
                "set data.image_mode=fast, or data.dali_device=cpu",
            )
        )
    if data.dali_device == "mixed" and parallel is not None and parallel.device == "cpu":
        problems.append(
            Problem(
                "data.dali_device",
                "mixed",
                "decodes on a GPU, but parallel.device = cpu",
                "set data.dali_device=cpu, or parallel.device=cuda",
            )
        )
    return problems


def check_dali(data: DataConfig) -> list[Problem]:
    """Whether this machine has DALI, where it is asked for. Nothing else takes its place."""
    if data.image_backend != "dali" or dali_is_installed():
        return []
    return [
        Problem(
            "data.image_backend",
            "dali",
            "NVIDIA DALI is not installed",
            "pip install 'megatron-vl[dali]' (nvidia-dali-cuda130; runs on machines without a GPU too), "
            "or set data.image_backend=torch",
        )
    ]


def dali_is_installed() -> bool:
    """Looks for the package without importing it."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package nvidia at all
        return False
