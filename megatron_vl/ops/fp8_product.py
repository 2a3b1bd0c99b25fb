"""Linear layers whose products are in FP8, with one scale per tensor, through ``torch._scaled_mm``.

A tensor is multiplied by ``largest FP8 value / largest absolute value`` and rounded to e4m3 (gradients: e5m2 by
choice); products are summed in fp32 and divided by both scales. On GPUs from compute capability 8.9 that runs on the
tensor cores (never run here), on a CPU PyTorch computes it by this definition.

Over tensor-parallel ranks the scale of a tensor that is split is that of the whole tensor: each rank rounds its part to
what one rank would round it to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_vl.errors import ConfigError
from megatron_vl.plan.fp8 import MULTIPLE

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INPUT, WEIGHT, GRADIENT = range(3)


class Scaling(Protocol):
    """Who says by what a tensor is multiplied before it is rounded."""

    def scales(
        self, which: list[int], tensors: list[torch.Tensor], group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        """fp32, one per tensor. which: INPUT, WEIGHT, GRADIENT. group: the tensors are split over it; None: whole."""

    def dtype(self, which: int) -> torch.dtype:
        """The format of inputs, weights or gradients."""


@dataclass(frozen=True)
class Split:
    """How a linear layer is cut over the tensor-parallel ranks of ``group``.

    gather: the input is split by token (sequence parallelism before a column-parallel layer). column: the weight is
    split by output (so are the gradients of the output), else by input (so are inputs). sum_gradient: the gradient
    of the input is summed here.
    """

    group: dist.ProcessGroup
    column: bool
    gather: bool = False
    sum_gradient: bool = False

    @property
    def shared(self) -> dist.ProcessGroup | None:
        """The group, where it has more than one rank."""
        return self.group if self.group.size() > 1 else None


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, fp32; nan where there is one."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=tensor.device)
    return torch.linalg.vector_norm(tensor.detach(), float("inf"), dtype=torch.float32)


def scale_of(amax: torch.Tensor, dtype: torch.dtype, margin: int = 0) -> torch.Tensor:
    """By what a tensor is multiplied. 1 where all is zero; what is not finite stays so, to be seen in the loss."""
    scale = torch.finfo(dtype).max / amax / 2**margin
    scale = torch.where(torch.isinf(scale), torch.ones_like(scale), scale)  # no value, or too small a one
    return torch.where(torch.isinf(amax), torch.full_like(scale, torch.nan), scale)


def quantise(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` times ``scale``, rounded to ``dtype``; beyond its range (of older steps) the largest value.

    On a GPU with Triton one kernel reads and writes each value once.
    """
    fused = _fused_rounding() if tensor.is_cuda else None
    return (fused or _rounding)(tensor.detach(), scale, dtype)


def _rounding(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return (tensor * scale).clamp(-limit, limit).to(dtype)


@lru_cache(maxsize=1)
def _fused_rounding() -> Callable[..., torch.Tensor] | None:
    """`_rounding` compiled; never run."""
    return torch.compile(_rounding, dynamic=True) if find_spec("triton") is not None else None


def scaled_product(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    dtype: torch.dtype,
    fast: bool,
) -> torch.Tensor:
    """``a`` ``[m, k]`` times the transpose of ``b`` ``[n, k]``, both contiguous FP8: ``[m, n]`` in ``dtype``.

    fast: sums on the tensor cores may lose low bits, as is usual forward and not backward.
    """
    return torch._scaled_mm(
        a, b.t(), scale_a=1 / scale_a, scale_b=1 / scale_b, out_dtype=dtype, use_fast_accum=fast and a.is_cuda
    )


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, scaling: Scaling, split: Split) -> torch.Tensor:
    """``x`` ``[s, b, in]`` times the transpose of ``weight`` ``[out, in]``.

    Rows are a multiple of 16 where there is a backward pass; else zeros are added to them for the moment.

    Raises:
        ConfigError: they are not.
    """
    rows = x.shape[:-1].numel() * (split.group.size() if split.gather else 1)
    if torch.is_grad_enabled() and rows % MULTIPLE:
        raise ConfigError(
            f"precision.fp8: {rows} rows meet a weight of {list(weight.shape)}; training needs a multiple of "
            f"{MULTIPLE}: change data.seq_length or train.micro_batch_size, or use fp8 none"
        )
    return _Fp8Linear.apply(x, weight, scaling, split)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scaling: Scaling, split: Split):
        split_input = split.gather or not split.column
        if split_input or split.shared is None:
            scale_x, scale_w = scaling.scales([INPUT, WEIGHT], [x, weight], split.shared)
        else:
            (scale_x,) = scaling.scales([INPUT], [x], None)
            (scale_w,) = scaling.scales([WEIGHT], [weight], split.shared)
        small = quantise(x, scale_x, scaling.dtype(INPUT))
        flat = _rows(_gathered(small, split) if split.gather else small)
        missing = -len(flat) % MULTIPLE
        padded = F.pad(flat.view(torch.uint8), (0, 0, 0, missing)).view(flat.dtype) if missing else flat
        whole_weight = quantise(weight, scale_w, scaling.dtype(WEIGHT))
        out = scaled_product(padded, whole_weight, scale_x, scale_w, x.dtype, fast=True)
        ctx.save_for_backward(small if ctx.needs_input_grad[1] else None, weight, scale_x, scale_w)
        ctx.scaling, ctx.split, ctx.shape = scaling, split, small.shape
        return out[: len(flat)].view(-1, x.shape[1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        small, weight, scale_x, scale_w = ctx.saved_tensors
        scaling, split = ctx.scaling, ctx.split
        (scale_g,) = scaling.scales([GRADIENT], [grad], split.shared if split.column else None)
        gradient = _rows(quantise(grad, scale_g, scaling.dtype(GRADIENT)))
        grad_x, grad_weight, pending, summed = None, None, None, None
        if ctx.needs_input_grad[0]:
            turned = quantise(weight, scale_w, scaling.dtype(WEIGHT)).t().contiguous()
            summed = scaled_product(gradient, turned, scale_g, scale_w, grad.dtype, fast=False)
            grad_x, pending = _returned(summed.view(*grad.shape[:2], -1), ctx.shape, split)
        if ctx.needs_input_grad[1]:  # beside the sum over the ranks
            flat = _rows(_gathered(small, split) if split.gather else small)
            grad_weight = scaled_product(
                gradient.t().contiguous(), flat.t().contiguous(), scale_g, scale_x, weight.dtype, fast=False
            )
        if pending is not None:
            pending.wait()
        return grad_x, grad_weight, None, None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[s, b, n] -> [s * b, n]``, contiguous."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _gathered(small: torch.Tensor, split: Split) -> torch.Tensor:
    """The tokens of all ranks; FP8 travels as bytes."""
    if split.shared is None:
        return small
    whole = small.new_empty((split.group.size() * small.shape[0], *small.shape[1:]))
    dist.all_gather_into_tensor(whole.view(torch.uint8), small.view(torch.uint8), group=split.group)
    return whole


def _returned(grad: torch.Tensor, shape: torch.Size, split: Split) -> tuple[torch.Tensor, dist.Work | None]:
    """The gradient of this rank's input, perhaps still on its way."""
    if split.shared is None:
        return grad, None
    if split.gather:
        mine = grad.new_empty(shape)
        return mine, dist.reduce_scatter_tensor(mine, grad.contiguous(), group=split.group, async_op=True)
    if split.sum_gradient:
        return grad, dist.all_reduce(grad, group=split.group, async_op=True)
    return grad, None
