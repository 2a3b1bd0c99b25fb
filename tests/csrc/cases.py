"""Each operation with its inputs and its definition in float64; shared by the tests on CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_vl.ops.activation import bias_quick_gelu
from megatron_vl.ops.residual import scale_residual, scale_residual_norm
from megatron_vl.ops.rotary import rope_2d, rotary_angles, rotary_table

EPS, BASE = 1e-5, 10000.0


@dataclass(frozen=True)
class Case:
    """run: the operation as the model calls it. define: the same in float64. shapes: of its tensors, in order."""

    run: Callable[..., tuple[torch.Tensor, ...]]
    define: Callable[..., tuple[torch.Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]


def activation(patches: int, views: int, width: int) -> Case:
    def define(x, bias):
        u = x + bias
        return (u / (1 + (-1.702 * u).exp()),)

    return Case(lambda x, bias: (bias_quick_gelu(x, bias),), define, ((patches, views, width), (width,)))


def residual(patches: int, views: int, width: int) -> Case:
    whole, columns = (patches, views, width), (width,)
    return Case(
        lambda x, bias, gamma, left: (scale_residual(x, bias, gamma, left),),
        lambda x, bias, gamma, left: (left + gamma * (x + bias),),
        (whole, columns, columns, whole),
    )


def residual_norm(patches: int, views: int, width: int) -> Case:
    def define(x, bias, gamma, left, weight, shift):
        y = left + gamma * (x + bias)
        centred = y - y.mean(-1, keepdim=True)
        return y, centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + shift

    whole, columns = (patches, views, width), (width,)
    shapes = (whole, columns, columns, whole, columns, columns)
    return Case(lambda *tensors: scale_residual_norm(*tensors, EPS), define, shapes)


def rotary(grid: int, views: int, heads: int, channels: int, device: torch.device) -> Case:
    """Defined by complex numbers: a pair of channels turns by the angle of its patch."""

    def define(qkv):
        angle = rotary_angles(grid, channels, BASE, device)[..., ::2].double()
        turn = torch.polar(torch.ones_like(angle), angle)
        query, key, value = qkv.split(channels, dim=-1)
        turned = [
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(
                -2
            )
            for x in (query, key)
        ]
        return *turned, value

    table = rotary_table(grid, channels, BASE, device)
    return Case(lambda qkv: rope_2d(qkv, table), define, ((grid * grid, views, heads, 3 * channels),))


def draw(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> list[torch.Tensor]:
    """Inputs that require gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
        for shape in case.shapes
    ]


def errors(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[float]:
    """Relative errors of all outputs, then of the gradients of all inputs. NaN where something was not written."""
    inputs = draw(case, dtype, device, seed)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    outputs, expected = case.run(*inputs), case.define(*wide)
    generator = torch.Generator(device).manual_seed(seed + 1)
    grads = [torch.randn(y.shape, generator=generator, device=device).to(dtype) for y in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(expected, [g.double() for g in grads])
    assert all(y.dtype == dtype for y in outputs)
    pairs = [*zip(outputs, expected), *((x.grad, w.grad) for x, w in zip(inputs, wide))]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
