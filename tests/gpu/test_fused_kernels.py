"""The element-wise kernels on one Hopper GPU against float64, at the released widths. Written without a GPU: never run.

Needs `make -C csrc` first. Memory that an operator leaves unwritten is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_vl.ops import library
from megatron_vl.ops.pixels import embedding_patches, normalised, patchify
from tests.csrc.cases import Case, activation, draw, errors, residual, residual_norm, rotary

pytestmark = pytest.mark.gpu
GRIDS, VIEWS = (52, 36), (1, 3, 7)
WIDTH, INNER, HEADS, CHANNELS = 1536, 8960, 16, 96
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[torch.device]:
    device = torch.device("cuda")
    state = library.choose_kernels("auto", device)
    if state != "used":
        pytest.skip(f"fused kernels: {state}")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    yield device
    torch.use_deterministic_algorithms(False)


def cases(grid: int, views: int, device: torch.device) -> dict[str, Case]:
    patches = grid * grid
    return {
        "activation": activation(patches, views, INNER),
        "activation of a rank of 8": activation(patches, views, INNER // 8),
        "residual": residual(patches, views, WIDTH),
        "residual and norm": residual_norm(patches, views, WIDTH),
        "rotary": rotary(grid, views, HEADS, CHANNELS, device),
        "rotary of a rank of 8": rotary(grid, views, HEADS // 8, CHANNELS, device),
    }


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("grid", GRIDS)
def test_outputs_and_gradients(kernels, grid, views, dtype):
    for name, case in cases(grid, views, kernels).items():
        found = errors(case, dtype, kernels, seed=views)
        print(f"{name}, grid {grid}, {views} views, {dtype}: {max(found):.2e}")
        assert max(found) < LIMITS[dtype], (name, found)


@pytest.mark.parametrize("rows", [1, 5, 131])
def test_few_rows(kernels, rows):
    for case in (activation(rows, 1, INNER), residual(rows, 1, WIDTH), residual_norm(rows, 1, WIDTH)):
        assert max(errors(case, torch.bfloat16, kernels)) < LIMITS[torch.bfloat16]


def test_two_runs_are_equal_to_the_bit(kernels):
    """Sums over rows are taken in a fixed order."""
    for name, case in cases(36, 3, kernels).items():
        runs = []
        for _ in range(2):
            inputs = draw(case, torch.bfloat16, kernels, 0)
            outputs = case.run(*inputs)
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            runs.append([*outputs, *(x.grad for x in inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*runs)), name


def test_another_stream(kernels):
    """Kernels are launched on PyTorch's current stream: work queued before them is seen."""
    case = activation(2704, 3, INNER)
    x, bias = (t.detach() for t in draw(case, torch.bfloat16, kernels, 0))
    expected = case.run(x, bias)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = torch.empty_like(x).copy_(x)
        found = case.run(late, bias)[0]
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("views", "side"), [(1, 728), (3, 728), (7, 504)])
def test_bytes_become_the_same_patches(kernels, views, side, dtype):
    pixels = torch.randint(256, (views, 3, side, side), dtype=torch.uint8, device=kernels)
    ours = embedding_patches(pixels, torch.empty(1, dtype=dtype, device=kernels), 14)
    expected = patchify(normalised(pixels.cpu(), dtype), 14)
    assert torch.equal(ours.cpu(), expected), "the same rounding in the same order"
