"""The projector's 3x3, stride-2, padding-1 convolutions, on token layout from end to end.

``downsample`` takes tokens ``[g * g, n, c]`` as the tower leaves them (positions row by row, then views) and gives
``[ceil(g / 2)^2, n, out]``; no form goes through channels-first images. Three forms of equal arguments, chosen by
``form_of``:

* torch: windows as a strided view, copied into an operand ``[.., c * 9]``, times the weight. Everywhere.
* gather: the same operand by our kernels (``csrc/projector_gather.cu``), products by the library. Where
  ``parallel.fused_kernels`` are in use.
* implicit: products straight from the tokens (``csrc/projector_implicit.cu``), without an operand. Where they are in
  use, ``parallel.projector_kernel = implicit`` asks for it, and the sizes fit.

The operand's nine taps of a channel stand together, as in the released weight ``[out, c, 3, 3]``: neither the weight
nor its gradient is packed anew, and cutting input channels over ranks cuts contiguous columns. No form keeps the
operand for the backward pass: it is 9/4 of the tokens and gathered again, some views at a time.

gather and implicit were never run on a GPU: written without one. Their index maths is tested on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_vl.errors import ConfigError
from megatron_vl.ops import library

Tensor = torch.Tensor
KEY = "parallel.projector_kernel"
TAPS = 9
OPERAND_BYTES = 1 << 30  # of the gathered operand that exists at once
IMPLICIT_CHANNELS = (
    256  # channels of tokens and outputs come in multiples of it; csrc/include/mvl/implicit.cuh
)
KERNELS = ("gather", "implicit")
_asked_for = "gather"


class Form(NamedTuple):
    """forward(tokens, weight, bias) -> out. dgrad(grad, weight, grid) -> tokens. wgrad(grad, tokens) -> weight."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    dgrad: Callable[[Tensor, Tensor, int], Tensor]
    wgrad: Callable[[Tensor, Tensor], Tensor]


def downsample(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution: tokens ``[g * g, n, c]``, weight ``[out, c * 9]``, bias ``[out]`` -> ``[half^2, n, out]``."""
    return _Downsample.apply(tokens, weight, bias, form_of(tokens, weight))


def form_of(tokens: Tensor, weight: Tensor) -> Form:
    """The form for these sizes, format and device, where ``use_projector`` asked for a kernel."""
    if not library.uses_kernels(tokens, tokens.shape[2]) or weight.dtype != tokens.dtype:
        return TORCH
    return IMPLICIT if _asked_for == "implicit" and fits_implicit(tokens, weight) else GATHER


def fits_implicit(tokens: Tensor, weight: Tensor) -> bool:
    """Whether the implicit products take these sizes: bf16, channels in multiples of 256."""
    widths = (tokens.shape[2], weight.shape[0])
    return tokens.dtype == torch.bfloat16 and all(width % IMPLICIT_CHANNELS == 0 for width in widths)


def use_projector(kernel: str) -> None:
    """Which kernel ``downsample`` takes where fused kernels are in use; sizes that implicit does not take, gather does.

    Raises:
        ConfigError: no such kernel.
    """
    global _asked_for
    if kernel not in KERNELS:
        raise ConfigError(f"{KEY} = {kernel}: must be one of {', '.join(KERNELS)}")
    _asked_for = kernel


class _Downsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.form = form
        return form.forward(tokens, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        grad, form = grad.contiguous(), ctx.form
        to_tokens, to_weight, to_bias, _ = ctx.needs_input_grad
        return (
            form.dgrad(grad, weight, side_of(tokens)) if to_tokens else None,
            form.wgrad(grad, tokens) if to_weight else None,
            grad.flatten(0, 1).sum(0) if to_bias else None,
            None,
        )


def side_of(tokens: Tensor) -> int:
    """Side of the square grid of tokens."""
    side = round(tokens.shape[0] ** 0.5)
    assert side * side == tokens.shape[0], f"{tokens.shape[0]} tokens are no square grid"
    return side


# --- an operand and library products


def gather_plain(tokens: Tensor) -> Tensor:
    """``[g * g, n, c] -> [half^2, n, c * 9]``: windows of every second position, zeros outside of the grid."""
    grid, (_, n, c) = side_of(tokens), tokens.shape
    padded = F.pad(tokens.unflatten(0, (grid, grid)), (0, 0, 0, 0, 1, 1, 1, 1))
    windows = padded.unfold(0, 3, 2).unfold(1, 3, 2)  # [half, half, n, c, 3, 3], a view
    return windows.reshape(-1, n, c * TAPS)


def fold_plain_(tokens: Tensor, operand: Tensor) -> None:
    """The transpose of ``gather_plain``: every element of tokens ``[g * g, n, c]`` is overwritten, sums in fp32."""
    grid, (_, n, c) = side_of(tokens), tokens.shape
    half = (grid + 1) // 2
    wide = torch.promote_types(tokens.dtype, torch.float32)
    taps = operand.view(half, half, n, c, 3, 3)
    # output line a reads lines 2a .. 2a + 2 of a grid with a border, of which lines 1 .. g are tokens
    total = torch.zeros((2 * half + 1, 2 * half + 1, n, c), dtype=wide, device=tokens.device)
    for y in range(3):
        for x in range(3):
            total[y : y + 2 * half - 1 : 2, x : x + 2 * half - 1 : 2] += taps[..., y, x]
    tokens.copy_(total[1 : grid + 1, 1 : grid + 1].reshape(grid * grid, n, c))


def _gather(tokens: Tensor) -> Tensor:
    return torch.ops.megatron_vl.projector_gather(tokens)


def _fold_(tokens: Tensor, operand: Tensor) -> None:
    torch.ops.megatron_vl.projector_fold_(tokens, operand)


def _operand_form(
    name: str, gather: Callable[[Tensor], Tensor], fold_: Callable[[Tensor, Tensor], None]
) -> Form:
    """Views whose operand stays within ``OPERAND_BYTES`` at a time, at least one."""

    def slices(out: Tensor, width: int) -> list[slice]:
        step = max(1, OPERAND_BYTES // (out.shape[0] * width * out.element_size()))
        return [slice(first, min(first + step, out.shape[1])) for first in range(0, out.shape[1], step)]

    def forward(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = (side_of(tokens) + 1) // 2
        out = tokens.new_empty(half * half, tokens.shape[1], weight.shape[0])
        parts = slices(out, weight.shape[1])
        if len(parts) == 1:
            return F.linear(gather(tokens), weight, bias)
        for part in parts:
            out[:, part] = F.linear(gather(tokens[:, part]), weight, bias)
        return out

    def dgrad(grad: Tensor, weight: Tensor, grid: int) -> Tensor:
        tokens = grad.new_empty(grid * grid, grad.shape[1], weight.shape[1] // TAPS)
        for part in slices(grad, weight.shape[1]):
            fold_(tokens[:, part], grad[:, part] @ weight)
        return tokens

    def wgrad(grad: Tensor, tokens: Tensor) -> Tensor:
        parts = slices(grad, tokens.shape[2] * TAPS)
        products = (
            _product(grad[:, part].flatten(0, 1), gather(tokens[:, part]).flatten(0, 1), len(parts) > 1)
            for part in parts
        )
        total = next(products, None)
        if total is None:  # no views
            return grad.new_zeros(grad.shape[2], tokens.shape[2] * TAPS)
        for product in products:
            total += product
        return total.to(grad.dtype)

    return Form(name, forward, dgrad, wgrad)


def _product(grad: Tensor, operand: Tensor, partial: bool) -> Tensor:
    """``grad^T operand``; a partial one in fp32, so that sums over parts are not rounded in between."""
    if not partial:
        return grad.t() @ operand
    if grad.is_cuda and grad.dtype == torch.bfloat16:
        return torch.mm(grad.t(), operand, out_dtype=torch.float32)
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.t().to(wide) @ operand.to(wide)


# --- implicit products


def _implicit_forward(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.megatron_vl.projector_conv(tokens.contiguous(), weight, bias)


def _implicit_dgrad(grad: Tensor, weight: Tensor, grid: int) -> Tensor:
    return torch.ops.megatron_vl.projector_conv_dgrad(grad, weight, grid)


def _implicit_wgrad(grad: Tensor, tokens: Tensor) -> Tensor:
    return torch.ops.megatron_vl.projector_conv_wgrad(grad, tokens.contiguous())


TORCH = _operand_form("torch", gather_plain, fold_plain_)
GATHER = _operand_form("gather", _gather, _fold_)
IMPLICIT = Form("implicit", _implicit_forward, _implicit_dgrad, _implicit_wgrad)
