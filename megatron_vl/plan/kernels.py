"""Who computes: what of a run's backend, number formats and kernels decides memory and time."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.plan.fp8 import Fp8Layers, fp8_layers

FP32 = 4
HOPPER = (9, 0)  # compute capability that the kernels of csrc/ are built for
PACK_BYTES = 16  # what one access of a kernel moves
WIDEST_NORM = 6144  # bytes of a row that the kernel with a norm holds: 384 threads of 16 bytes


@dataclass(frozen=True)
class Kernels:
    """Where backends keep different things, and move different bytes.

    element: bytes of an activation. fused_norm: an RMS norm keeps its input; else (torch on a CPU) the input and the
    normalised input, both in fp32. joined_rows: attention takes several dense rows, or views, as one (torch), which
    copies V and the output. ring: context-parallel ranks pass K and V on; else they gather all of them for a moment.
    fp8: decoder layers with products in FP8, which keep their inputs so; fp8_vision: the tower's blocks too. fused: the
    tower's element-wise work is done by the kernels of csrc/. projector: form of its convolutions (ops/projector.py).
    pixel: bytes of a pixel's channel.
    """

    element: int
    fused_norm: bool
    joined_rows: bool
    ring: bool
    fp8: frozenset[int] = frozenset()
    fp8_vision: bool = False
    fused: bool = False
    projector: str = "torch"
    pixel: int = FP32

    def takes(self, channels: int, at_most: int | None = None) -> bool:
        """Whether a kernel of csrc/ takes rows of so many values: `ops/library.py:uses_kernels`."""
        size = channels * self.element
        return self.fused and size % PACK_BYTES == 0 and (at_most is None or size <= at_most)


def kernels_of(
    backend: str,
    element: int,
    on_cpu: bool,
    exchange: str = "p2p",
    fp8: Fp8Layers | None = None,
    fused: bool = False,
    projector: str = "gather",
    pixel: int = FP32,
) -> Kernels:
    """backend, exchange: `parallel.layer_backend`, where `auto` is taken as Transformer Engine on GPUs, and
    `parallel.cp_comm_type`, where `a2a` counts as a ring. element: 2 (bf16) or 4 (fp32). projector:
    `parallel.projector_kernel`, which is for fused kernels."""
    engine = backend == "transformer_engine" or (backend == "auto" and not on_cpu)
    layers, vision = (frozenset(), False) if fp8 is None else (fp8.decoder, fp8.vision)
    return Kernels(
        element, engine or not on_cpu, not engine, exchange != "all_gather", layers, vision, fused,
        projector if fused else "torch", pixel,
    )  # fmt: skip


def kernels_of_run(
    config: RunConfig, element: int, on_cpu: bool, capability: tuple[int, int] | None = HOPPER
) -> Kernels:
    """What a run has on a device. capability: compute capability of the GPU; not looked at on a CPU."""
    parallel = config.parallel
    return kernels_of(
        parallel.layer_backend,
        element,
        on_cpu,
        parallel.cp_comm_type,
        fp8_layers(config.precision, config.model.text.num_layers),
        uses_fused(parallel, None if on_cpu else capability),
        parallel.projector_kernel,
        1 if config.data.image_mode == "fast" else FP32,
    )


def uses_fused(parallel: ParallelConfig, capability: tuple[int, int] | None) -> bool:
    """Whether the kernels of csrc/ are used; `auto`: on a Hopper GPU, where the library is taken to be built.

    capability: None on a CPU, which keeps to PyTorch's kernels unless they are required.
    """
    if parallel.fused_kernels == "auto":
        return capability == HOPPER
    return parallel.fused_kernels == "required"
