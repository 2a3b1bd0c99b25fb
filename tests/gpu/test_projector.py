"""The projector's convolutions on one Hopper GPU, all forms, against conv2d in fp64. Never run: written without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_vl.ops import library, projector
from megatron_vl.ops.projector import GATHER, IMPLICIT, TORCH, Form, form_of, use_projector
from tests.ops.convolution import Results, by_conv2d, make_case, worst

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# grid, channels, out: both convolutions of a global view and of a crop
SIZES = [(52, 1536, 3072), (26, 3072, 6144), (36, 1536, 3072), (18, 3072, 6144), (13, 256, 512)]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Kernels in use; what torch.empty gives is NaN, so that an element that is not written is seen."""
    reason = library.why_not(CUDA)
    if reason is not None:
        pytest.skip(reason)
    library.choose_kernels("required", CUDA)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    use_projector("gather")
    library.choose_kernels("never", CUDA)


def through(form: Form, case) -> Results:
    tokens, weight, bias = (x.clone().requires_grad_() for x in case[:3])
    out = projector._Downsample.apply(tokens, weight, bias, form)
    out.backward(case.grad)
    return Results(out.detach(), tokens.grad, weight.grad, bias.grad)


@pytest.mark.parametrize("form", [TORCH, GATHER, IMPLICIT], ids=lambda form: form.name)
@pytest.mark.parametrize("views", [1, 3, 7])
@pytest.mark.parametrize(("grid", "channels", "out"), SIZES)
def test_output_and_gradients(poisoned, grid, channels, out, views, form):
    case = make_case(grid, views, channels, out, torch.bfloat16, "cuda", seed=grid + views)
    assert worst(through(form, case), by_conv2d(case)) < 1e-2


@pytest.mark.parametrize("form", [TORCH, GATHER], ids=lambda form: form.name)
def test_views_a_few_at_a_time(poisoned, monkeypatch, form):
    case = make_case(36, 5, 256, 512, torch.bfloat16, "cuda")
    monkeypatch.setattr(projector, "OPERAND_BYTES", 2 * 18 * 18 * 256 * 9 * 2)
    assert worst(through(form, case), by_conv2d(case)) < 1e-2


def test_equal_runs_give_equal_bits(poisoned):
    """A missing barrier shows as a result that changes."""
    case = make_case(26, 3, 3072, 6144, torch.bfloat16, "cuda")
    first = through(IMPLICIT, case)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, through(IMPLICIT, case)))


def test_the_choice(poisoned):
    case = make_case(36, 1, 256, 512, torch.bfloat16, "cuda")
    assert form_of(case.tokens, case.weight) is GATHER
    use_projector("implicit")
    assert form_of(case.tokens, case.weight) is IMPLICIT


def test_the_operand_is_not_kept(poisoned):
    """Between forward and backward pass only tokens, weight and output are alive."""
    case = make_case(52, 4, 1536, 3072, torch.bfloat16, "cuda")
    tokens, weight = case.tokens.requires_grad_(), case.weight.requires_grad_()
    before = torch.cuda.memory_allocated()
    out = projector._Downsample.apply(tokens, weight, case.bias, GATHER)
    assert torch.cuda.memory_allocated() - before <= out.numel() * 2 + (1 << 20)
