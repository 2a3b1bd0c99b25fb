"""Shapes and gradients of the library's ``projector_*`` operators. Imported by ops/library.py once they are loaded."""

from __future__ import annotations

import torch

from megatron_vl.ops.projector import TAPS, side_of

OPS = torch.ops.megatron_vl


def _halved(tokens: torch.Tensor) -> int:
    """Positions of the output grid."""
    return ((side_of(tokens) + 1) // 2) ** 2


@torch.library.register_fake("megatron_vl::projector_gather")
def _(tokens):
    return tokens.new_empty(_halved(tokens), tokens.shape[1], tokens.shape[2] * TAPS)


@torch.library.register_fake("megatron_vl::projector_fold_")
def _(tokens, operand):
    return None


@torch.library.register_fake("megatron_vl::projector_conv")
def _(tokens, weight, bias):
    return tokens.new_empty(_halved(tokens), tokens.shape[1], weight.shape[0])


@torch.library.register_fake("megatron_vl::projector_conv_dgrad")
def _(grad, weight, grid):
    return grad.new_empty(grid * grid, grad.shape[1], weight.shape[1] // TAPS)


@torch.library.register_fake("megatron_vl::projector_conv_wgrad")
def _(grad, tokens):
    return grad.new_empty(grad.shape[2], tokens.shape[2] * TAPS)


def _keep_tokens(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])  # shape only; the tokens are alive anyway


def _gather_backward(ctx, grad):
    (tokens,) = ctx.saved_tensors
    found = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    OPS.projector_fold_(found, grad.contiguous())
    return found


torch.library.register_autograd("megatron_vl::projector_gather", _gather_backward, setup_context=_keep_tokens)


def _keep_both(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _conv_backward(ctx, grad):
    tokens, weight = ctx.saved_tensors
    grad, (to_tokens, to_weight, to_bias) = grad.contiguous(), ctx.needs_input_grad
    return (
        OPS.projector_conv_dgrad(grad, weight, side_of(tokens)) if to_tokens else None,
        OPS.projector_conv_wgrad(grad, tokens) if to_weight else None,
        grad.flatten(0, 1).sum(0) if to_bias else None,
    )


torch.library.register_autograd("megatron_vl::projector_conv", _conv_backward, setup_context=_keep_both)
