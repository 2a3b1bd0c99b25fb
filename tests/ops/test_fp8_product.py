"""FP8 products against their definition, and against products in fp32 within the error of the formats."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_vl.errors import ConfigError
from megatron_vl.model.fp8_linear import AmaxScaling
from megatron_vl.ops.fp8_product import (
    E4M3,
    E5M2,
    Split,
    fp8_linear,
    largest,
    quantise,
    scale_of,
    scaled_product,
)
from megatron_vl.plan.fp8 import Fp8Recipe

ALONE = Split(SimpleNamespace(size=lambda: 1), column=True)
TENSORWISE = Fp8Recipe("tensorwise", "hybrid")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What becomes of a tensor, in fp32."""
    scale = torch.finfo(dtype).max / tensor.abs().max()
    return (tensor * scale).to(dtype).float() / scale


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scales_by_hand():
    assert largest(torch.tensor([1.0, -8.0])) == 8 and largest(torch.zeros(0)) == 0
    assert scale_of(torch.tensor(448.0), E4M3) == 1 and scale_of(torch.tensor(7.0), E4M3) == 64
    assert scale_of(torch.tensor(57344.0), E5M2, margin=2) == 0.25
    assert scale_of(torch.tensor(0.0), E4M3) == 1 and scale_of(torch.tensor(1e-45), E4M3) == 1
    kept = quantise(torch.tensor([7.0, -14.0, 0.5]), torch.tensor(64.0), E4M3).float()
    assert kept.tolist() == [448, -448, 32]  # what earlier steps did not foresee is cut


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    x = random(1, 16, 1, 16)
    x[3, 0, 5] = bad
    assert not fp8_linear(x, random(2, 16, 16), AmaxScaling(TENSORWISE), ALONE).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("left", "right"), [(E4M3, E4M3), (E5M2, E4M3)])
def test_the_product_is_that_of_the_rounded_tensors(dtype, left, right):
    a, b = random(1, 48, 64), random(2, 32, 64)
    scales = [scale_of(largest(t), d) for t, d in ((a, left), (b, right))]
    small = [quantise(t, s, d) for t, s, d in zip((a, b), scales, (left, right))]
    found = scaled_product(*small, *scales, dtype, fast=False)
    assert found.dtype == dtype
    assert error(found.float(), rounded(a, left) @ rounded(b, right).t()) < (
        1e-6 if dtype == torch.float32 else 4e-3
    )


@pytest.mark.parametrize(
    ("form", "gradient", "band"), [("hybrid", E5M2, (0.04, 0.08)), ("e4m3", E4M3, (0.02, 0.05))]
)
def test_forward_and_gradients(form, gradient, band):
    """By definition to fp32 noise; from fp32 as far as 3 (e4m3) and 2 (e5m2) bits of mantissa make it."""
    x, weight, grad = random(3, 24, 2, 96), random(4, 80, 96), random(5, 24, 2, 80)
    x.requires_grad_(), weight.requires_grad_()
    out = fp8_linear(x, weight, AmaxScaling(Fp8Recipe("tensorwise", form)), ALONE)
    out.backward(grad)
    some = [rounded(t.detach(), d) for t, d in ((x, E4M3), (weight, E4M3), (grad, gradient))]
    flat, matrix, back = some[0].view(-1, 96), some[1], some[2].view(-1, 80)
    expected = (flat @ matrix.t(), back @ matrix, back.t() @ flat)
    for found, by_definition in zip((out, x.grad, weight.grad), expected):
        assert error(found.reshape(by_definition.shape), by_definition) < 1e-5
    plain = (x @ weight.t(), grad @ weight, torch.einsum("sbo,sbi->oi", grad, x))
    for found, exact, (low, high) in zip((out, x.grad, weight.grad), plain, ((0.02, 0.05), band, band)):
        assert low < error(found, exact) < high


def test_scaling_matters():
    """Without scales small gradients are lost: what the scales are for."""
    grad = random(6, 16, 16) * 1e-8
    assert quantise(grad, torch.tensor(1.0), E5M2).float().count_nonzero() == 0
    assert error(rounded(grad, E5M2), grad) < 0.1


def test_rows_that_are_no_multiple_of_16():
    x, weight, scaling = random(7, 5, 1, 32), random(8, 48, 32).requires_grad_(), AmaxScaling(TENSORWISE)
    with pytest.raises(
        ConfigError, match=r"5 rows meet a weight of \[48, 32\]; training needs a multiple of 16"
    ):
        fp8_linear(x, weight, scaling, ALONE)
    with torch.no_grad():
        found = fp8_linear(x, weight, scaling, ALONE)
    assert found.shape == (5, 1, 48)
    assert error(found, rounded(x, E4M3) @ rounded(weight.detach(), E4M3).t()) < 1e-6


def test_delayed_scales_follow_the_history():
    scaling = AmaxScaling(Fp8Recipe("delayed", "hybrid", margin=1, history=3))
    first = [random(9, 16, 1, 16), random(10, 16, 16)]
    measured = [scale_of(largest(t), E4M3, 1) for t in first]
    assert scaling.scales([0, 1], first, None).tolist() == [s.item() for s in measured]
    assert scaling.seen.tolist() == [largest(first[0]), largest(first[1]), 0]
    scaling.fill(torch.tensor([[2.0, 3.0, 0.0], [4.0, 1.0, 0.0]]))
    assert scaling.begun == [True, True, False]
    assert scaling.scales([0, 1], first, None).tolist() == [448 / 4 / 2, pytest.approx(448 / 3 / 2)]
    grad = torch.full((16, 1, 16), 0.5)
    assert scaling.scales([2], [grad], None).tolist() == [57344 / 0.5 / 2]  # nothing known of it: measured
    latest = AmaxScaling(Fp8Recipe("delayed", "hybrid", history=2, compute="most_recent"))
    latest.fill(torch.tensor([[2.0, 3.0, 1.0], [4.0, 1.0, 1.0], [9.0, 9.0, 9.0]]))
    assert latest.scales([0, 1], first, None).tolist() == [224, pytest.approx(448 / 3)]
    scaling.eval()
    scaling.seen.zero_()
    scaling.scales([0], first[:1], None)
    assert scaling.seen.count_nonzero() == 0  # evaluation leaves no trace
