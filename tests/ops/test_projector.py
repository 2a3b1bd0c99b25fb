"""The projector's convolution without our kernels: values, gradients, views a few at a time, what is kept."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.config.load import load_run
from megatron_vl.errors import ConfigError
from megatron_vl.ops import projector
from megatron_vl.ops.projector import downsample, fold_plain_, gather_plain, use_projector
from megatron_vl.plan.checks import check_run
from tests.ops.convolution import Results, by_conv2d, make_case, worst

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def downsampled(case) -> Results:
    tokens, weight, bias = (x.clone().requires_grad_() for x in case[:3])
    out = downsample(tokens, weight, bias)
    out.backward(case.grad)
    return Results(out.detach(), tokens.grad, weight.grad, bias.grad)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("grid", "views"), [(1, 2), (2, 1), (4, 3), (9, 3), (13, 1), (36, 1)])
def test_values_and_gradients_are_those_of_conv2d(dtype, grid, views):
    case = make_case(grid, views, 8, 16, dtype)
    assert worst(downsampled(case), by_conv2d(case)) < LIMITS[dtype]


@pytest.mark.parametrize("views", [1, 5])
def test_views_a_few_at_a_time_change_nothing(monkeypatch, views):
    case = make_case(9, views, 8, 16, torch.bfloat16)
    monkeypatch.setattr(projector, "OPERAND_BYTES", 2 * 25 * 8 * 9 * 2)  # two views
    calls, product = [], projector._product
    monkeypatch.setattr(projector, "_product", lambda *given: calls.append(given) or product(*given))
    assert worst(downsampled(case), by_conv2d(case)) < LIMITS[torch.bfloat16]
    assert len(calls) == (views + 1) // 2


def test_a_swapped_tap_would_be_seen():
    case = make_case(9, 3, 8, 16, torch.bfloat16)
    wrong = case.weight.view(16, 8, 3, 3).transpose(2, 3).reshape(16, 72)
    assert worst(downsampled(replace_weight(case, wrong)), by_conv2d(case)) > 0.1


def replace_weight(case, weight):
    return case._replace(weight=weight.contiguous())


def test_fold_is_the_transpose_of_gather():
    """<gather(x), y> = <x, fold(y)> for every grid up to 9."""
    for grid in range(1, 10):
        x = torch.randn(grid * grid, 2, 3, dtype=torch.float64)
        windows = gather_plain(x)
        y, folded = torch.randn_like(windows), torch.full_like(x, float("nan"))
        fold_plain_(folded, y)
        torch.testing.assert_close((windows * y).sum(), (x * folded).sum())


def test_windows_are_not_kept_for_the_backward_pass():
    kept = []
    tokens, weight = torch.randn(81, 2, 8, requires_grad=True), torch.randn(16, 72, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        downsample(tokens, weight, None)
    assert sorted(kept) == sorted([tokens.numel(), weight.numel()])


def test_no_views_give_no_rows_and_a_gradient_of_zeros():
    tokens, weight = torch.empty(81, 0, 8, requires_grad=True), torch.randn(16, 72, requires_grad=True)
    out = downsample(tokens, weight, None)
    out.sum().backward()
    assert out.shape == (25, 0, 16) and weight.grad.abs().max() == 0 and tokens.grad.shape == tokens.shape


def test_only_what_is_trained_gets_a_gradient():
    case = make_case(4, 2, 8, 16, torch.float32)
    weight = case.weight.requires_grad_()
    downsample(case.tokens, weight, case.bias).sum().backward()
    assert weight.grad is not None and case.tokens.grad is None


def test_a_kernel_that_does_not_exist():
    with pytest.raises(ConfigError, match="projector_kernel = magic: must be one of gather, implicit"):
        use_projector("magic")


def test_the_release_fits_the_implicit_products():
    config = load_run(overrides=["preset=step3_vl_10b", "parallel.projector_kernel=implicit"]).config
    assert check_run(config) == []
    cut = replace(config.parallel, tensor_model_parallel_size=8, vision_placement="tensor")
    assert ["use gather" in str(p) for p in check_run(replace(config, parallel=cut))] == [True]
