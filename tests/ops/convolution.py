"""The projector's convolution by torch's own conv2d, in float64, and random arguments for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_vl.parity.compare import relative


class Case(NamedTuple):
    """tokens ``[g * g, n, c]``, weight ``[out, c * 9]``, bias ``[out]``, grad ``[half^2, n, out]``."""

    tokens: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    grad: torch.Tensor


class Results(NamedTuple):
    out: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def make_case(
    grid: int, views: int, channels: int, out: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Case:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    half = (grid + 1) // 2
    weight = draw(out, channels * 9, scale=(9 * channels) ** -0.5)
    return Case(draw(grid * grid, views, channels), weight, draw(out), draw(half * half, views, out))


def by_conv2d(case: Case) -> Results:
    """Output and gradients in float64 on the case's device."""
    tokens, weight, bias = (x.double().requires_grad_() for x in case[:3])
    positions, views, channels = tokens.shape
    grid = round(positions**0.5)
    image = tokens.permute(1, 2, 0).reshape(views, channels, grid, grid)
    kernel = weight.view(-1, channels, 3, 3)
    out = torch.nn.functional.conv2d(image, kernel, bias, stride=2, padding=1).flatten(2).permute(2, 0, 1)
    out.backward(case.grad.double())
    return Results(out.detach(), tokens.grad, weight.grad, bias.grad)


def worst(found: Results, expected: Results) -> float:
    """The largest relative error (of norms) of the results; NaN counts as infinite."""
    errors = [relative(a.double().cpu(), b.cpu()) for a, b in zip(found, expected)]
    return max(error if error == error else float("inf") for error in errors)
