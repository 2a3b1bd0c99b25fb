"""Shapes and gradients of the library's element-wise operators. Imported by ops/library.py once they are loaded.

Every operator has its PyTorch form in the module that calls it: activation, residual, rotary, pixels.
"""

from __future__ import annotations

import torch

kernels = torch.ops.megatron_vl


def _contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients as the kernels take them."""
    return tuple(t.contiguous() for t in tensors)


# --- bias_quick_gelu(x [..., c], bias [c]) -> [..., c]


@torch.library.register_fake("megatron_vl::bias_quick_gelu")
def _(x, bias):
    return torch.empty_like(x)


@torch.library.register_fake("megatron_vl::bias_quick_gelu_backward")
def _(grad, x, bias):
    return torch.empty_like(x), torch.empty_like(bias)


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _bias_quick_gelu_backward(ctx, grad):
    return kernels.bias_quick_gelu_backward(*_contiguous(grad), *ctx.saved_tensors)


torch.library.register_autograd(
    "megatron_vl::bias_quick_gelu", _bias_quick_gelu_backward, setup_context=_keep_inputs
)

# --- scale_residual(x [..., c], bias [c], gamma [c], residual [..., c]) -> [..., c]


@torch.library.register_fake("megatron_vl::scale_residual")
def _(x, bias, gamma, residual):
    return torch.empty_like(x)


@torch.library.register_fake("megatron_vl::scale_residual_backward")
def _(grad, x, bias, gamma):
    return torch.empty_like(x), torch.empty_like(bias), torch.empty_like(gamma)


def _keep_branch(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _scale_residual_backward(ctx, grad):
    (grad,) = _contiguous(grad)
    return *kernels.scale_residual_backward(grad, *ctx.saved_tensors), grad


torch.library.register_autograd(
    "megatron_vl::scale_residual", _scale_residual_backward, setup_context=_keep_branch
)

# --- scale_residual_norm(x, bias, gamma, residual, weight [c], shift [c], eps) -> y, normed, mean [...], rstd [...]


@torch.library.register_fake("megatron_vl::scale_residual_norm")
def _(x, bias, gamma, residual, weight, shift, eps):
    statistics = [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(x), torch.empty_like(x), *statistics


@torch.library.register_fake("megatron_vl::scale_residual_norm_backward")
def _(grad_y, grad_normed, x, bias, gamma, weight, y, mean, rstd):
    columns = [torch.empty_like(bias) for _ in range(4)]
    return torch.empty_like(x), *columns[:2], torch.empty_like(x), *columns[2:]


def _keep_norm(ctx, inputs, output) -> None:
    x, bias, gamma, _, weight, _, _ = inputs
    y, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, bias, gamma, weight, y, mean, rstd)


def _scale_residual_norm_backward(ctx, grad_y, grad_normed, grad_mean, grad_rstd):
    grads = _contiguous(grad_y, grad_normed)
    return *kernels.scale_residual_norm_backward(*grads, *ctx.saved_tensors), None


torch.library.register_autograd(
    "megatron_vl::scale_residual_norm", _scale_residual_norm_backward, setup_context=_keep_norm
)

# --- rope_2d(qkv [s, b, heads, 3 d], table fp32 [s, d / 2, 2]) -> q, k, v, each [b, s, heads, d]


@torch.library.register_fake("megatron_vl::rope_2d")
def _(qkv, table):
    s, b, heads, width = qkv.shape
    return tuple(qkv.new_empty((b, s, heads, width // 3)) for _ in range(3))


@torch.library.register_fake("megatron_vl::rope_2d_backward")
def _(q, k, v, table):
    b, s, heads, d = q.shape
    return q.new_empty((s, b, heads, 3 * d))


def _keep_table(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _rope_2d_backward(ctx, *grads):
    return kernels.rope_2d_backward(*_contiguous(*grads), *ctx.saved_tensors), None


torch.library.register_autograd("megatron_vl::rope_2d", _rope_2d_backward, setup_context=_keep_table)

# --- patchify(pixels uint8 [n, 3, H, W], mean [3], deviation [3], patch, bfloat16) -> [H W / patch^2, n, 3 patch^2]


@torch.library.register_fake("megatron_vl::patchify")
def _(pixels, mean, deviation, patch, bfloat16):
    n, channels, height, width = pixels.shape
    sizes = ((height // patch) * (width // patch), n, channels * patch * patch)
    return pixels.new_empty(sizes, dtype=torch.bfloat16 if bfloat16 else torch.float32)
