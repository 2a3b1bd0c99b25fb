"""FP8 products on the tensor cores. Never run."""

import pytest
import torch

from megatron_vl.model.fp8_linear import AmaxScaling
from megatron_vl.ops.fp8_product import E4M3, E5M2, fp8_linear
from megatron_vl.plan.fp8 import Fp8Recipe
from tests.ops.test_fp8_product import ALONE, error, rounded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs sm_89"
    ),
]


@pytest.mark.parametrize(("tokens", "inner", "outer"), [(4096, 4096, 6144), (528, 12288, 4096), (16, 64, 48)])
@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
def test_forward_and_gradients_by_definition(tokens, inner, outer, form):
    """Against products of the rounded tensors in fp32: what is left is the bf16 of the results."""
    generator = torch.Generator("cuda").manual_seed(1)
    x, weight, grad = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16()
        for shape in ((tokens, 1, inner), (outer, inner), (tokens, 1, outer))
    )
    x.requires_grad_(), weight.requires_grad_()
    out = fp8_linear(x, weight, AmaxScaling(Fp8Recipe("tensorwise", form)).cuda(), ALONE)
    out.backward(grad)
    back = rounded(grad.float(), E5M2 if form == "hybrid" else E4M3).view(tokens, outer)
    flat, matrix = (rounded(t.detach().float(), E4M3) for t in (x.view(tokens, inner), weight))
    expected = (flat @ matrix.t(), back @ matrix, back.t() @ flat)
    for found, by_definition in zip((out, x.grad, weight.grad), expected):
        assert error(found.float().view(by_definition.shape), by_definition) < 1e-2
