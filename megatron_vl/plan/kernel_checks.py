"""Which sizes the fused kernels of ``csrc/`` take, where one was asked for by name."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vl.config.model import VisionConfig
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import Problem

PROJECTOR = "parallel.projector_kernel"
IMPLICIT_CHANNELS = 256  # csrc/include/mvl/implicit.cuh: columns of a tile


def check_kernels(vision: VisionConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """``fused_kernels: auto`` is decided when the model is built; a kernel that it leaves out is not missed."""
    if parallel.projector_kernel != "implicit":
        return
    if parallel.fused_kernels == "never":
        yield Problem(
            PROJECTOR,
            "implicit",
            "is a fused kernel, but parallel.fused_kernels = never",
            "remove one of the two",
        )
    split = parallel.tensor_model_parallel_size if parallel.vision_placement == "tensor" else 1
    widths = (vision.hidden_size, 2 * vision.hidden_size // split, 4 * vision.hidden_size)
    if any(width % IMPLICIT_CHANNELS for width in widths):
        yield Problem(
            PROJECTOR,
            "implicit",
            f"takes channels in multiples of {IMPLICIT_CHANNELS}, but a rank's convolutions have "
            f"{' -> '.join(map(str, widths))}",
            "use gather",
        )
