"""The projector's kernels through their CPU form, byte by byte; their index maps at the released sizes; the gate."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_vl.ops import projector
from megatron_vl.ops.projector import (
    GATHER,
    IMPLICIT,
    TORCH,
    fold_plain_,
    form_of,
    gather_plain,
    use_projector,
)
from tests.csrc.building import SOURCES, need
from tests.csrc.test_compile_gate import checked
from tests.ops.convolution import by_conv2d, make_case, worst
from tests.ops.test_projector import downsampled

INCLUDE, MAPS = SOURCES / "include", Path(__file__).with_name("index_maps.cpp")
OPS = torch.ops.megatron_vl
GRIDS = [1, 2, 5, 9, 13, 14, 15, 16, 29, 36, 52]


@pytest.fixture
def implicit(kernels):
    use_projector("implicit")
    yield
    use_projector("gather")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_windows_and_back(kernels, grid, dtype):
    """Of a slice of the views: its neighbours stay as they are."""
    all_tokens = torch.randn(grid * grid, 5, 16).to(dtype)
    tokens = all_tokens[:, 1:4]
    operand = OPS.projector_gather(tokens)
    assert torch.equal(operand, gather_plain(tokens))
    operand = torch.randn(operand.shape).to(dtype)
    found, expected = torch.full_like(all_tokens, float("nan")), torch.empty_like(tokens)
    OPS.projector_fold_(found[:, 1:4], operand)
    fold_plain_(expected, operand)
    torch.testing.assert_close(found[:, 1:4], expected)
    assert found[:, ::4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("grid", "views"), [(52, 1), (36, 3), (9, 3)])
def test_gathered_products(kernels, monkeypatch, grid, views, dtype):
    case = make_case(grid, views, 16, 32, dtype)
    assert form_of(case.tokens, case.weight) is GATHER
    monkeypatch.setattr(
        projector, "OPERAND_BYTES", 2 * case.grad.shape[0] * 16 * 9 * case.grad.element_size()
    )
    assert worst(downsampled(case), by_conv2d(case)) < (1e-5 if dtype == torch.float32 else 1e-2)


# one row tile and several, rows that are no multiple of anything, two column tiles, two groups of channels
@pytest.mark.parametrize(
    ("grid", "views", "channels", "out"),
    [(1, 2, 256, 256), (5, 3, 256, 256), (13, 3, 256, 256), (4, 1, 256, 512)],
)
def test_implicit_products(implicit, grid, views, channels, out):
    case = make_case(grid, views, channels, out, torch.bfloat16)
    assert form_of(case.tokens, case.weight) is IMPLICIT
    assert worst(downsampled(case), by_conv2d(case)) < 1e-2


def test_a_swapped_tap_would_be_seen(implicit):
    case = make_case(5, 1, 256, 256, torch.bfloat16)
    wrong = case.weight.view(256, 256, 3, 3).transpose(2, 3).reshape(256, -1).contiguous()
    assert worst(downsampled(case._replace(weight=wrong)), by_conv2d(case)) > 0.1


def test_who_takes_which_sizes(implicit):
    def form(channels: int, out: int, dtype: torch.dtype):
        return form_of(torch.empty(4, 1, channels, dtype=dtype), torch.empty(out, channels * 9, dtype=dtype))

    assert form(256, 512, torch.bfloat16) is IMPLICIT
    assert form(256, 384, torch.bfloat16) is form(128, 256, torch.bfloat16) is GATHER
    assert form(256, 512, torch.float32) is GATHER
    assert form(12, 512, torch.bfloat16) is form(256, 512, torch.float64) is TORCH
    use_projector("gather")
    assert form(256, 512, torch.bfloat16) is GATHER


def test_refusals(kernels):
    with pytest.raises(RuntimeError, match="5 tokens are no square grid"):
        OPS.projector_gather(torch.zeros(5, 1, 8))
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        OPS.projector_gather(torch.zeros(4, 1, 6))
    with pytest.raises(RuntimeError, match="the operand must be contiguous"):
        OPS.projector_fold_(torch.zeros(4, 1, 8), torch.zeros(1, 1, 8))
    bf16 = dict(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="multiples of 256 and fewer than 2.30 tokens, not 128 to 256"):
        OPS.projector_conv(torch.zeros(4, 1, 128, **bf16), torch.zeros(256, 128 * 9, **bf16), None)
    with pytest.raises(RuntimeError, match="must be bfloat16"):
        OPS.projector_conv_wgrad(torch.zeros(1, 1, 256), torch.zeros(4, 1, 256))


def test_pytorchs_own_checks(kernels):
    small, wide = make_case(3, 2, 8, 8, torch.float32), make_case(2, 1, 256, 256, torch.bfloat16)
    tokens, weight, bias = (x.requires_grad_() for x in wide[:3])
    still = [x.detach() for x in wide]
    arguments = {
        "projector_gather": (small.tokens.requires_grad_(),),
        "projector_fold_": (torch.zeros(9, 2, 8), torch.randn(4, 2, 72)),
        "projector_conv": (tokens, weight, bias),
        "projector_conv_dgrad": (still[3], still[1], 2),
        "projector_conv_wgrad": (still[3], still[0]),
    }
    for name, given in arguments.items():
        torch.library.opcheck(getattr(OPS, name).default, given)


def run_maps(folder: Path, include: Path) -> subprocess.CompletedProcess:
    need("g++")
    program = folder / "index_maps"
    command = ["g++", "-std=c++17", "-O2", "-Wall", f"-I{include}", str(MAPS), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([program], capture_output=True, text=True)


def test_index_maps_at_the_released_sizes(tmp_path):
    done = run_maps(tmp_path, INCLUDE)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("((chunk ^ (line & 7)) << 4)", "(chunk << 4)", "bank conflict"),
        ("const int dy = y ? 2 - 2 * sy : 1", "const int dy = y ? 2 * sy : 1", "tap inside|source row"),
        ("y >= 0 && y < dense.source_side", "y < dense.source_side", "tap inside"),
        ("within % height, within / height", "within % kGroup, within / kGroup", "tile"),
        ("+ ((i & 2) ? 8 : 0)", "", "accumulator"),
    ],
)
def test_planted_faults_in_the_maps_are_found(tmp_path, right, wrong, message):
    include = tmp_path / "include"
    shutil.copytree(INCLUDE, include)
    header = include / "mvl" / "implicit.cuh"
    text = header.read_text(encoding="utf-8")
    assert text.count(right) == 1
    header.write_text(text.replace(right, wrong), encoding="utf-8")
    done = run_maps(tmp_path, include)
    assert done.returncode == 1
    assert any(part in done.stdout for part in message.split("|")), done.stdout


def test_products_are_not_serialized(tmp_path):
    """ptxas says so (notes C7510 to C7515) where it waits after every wgmma; then nothing overlaps any more."""
    done = checked(SOURCES, tmp_path, "KERNELS=projector_implicit.cu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "projector_implicit.cu: 6 kernels, HGMMA" in done.stdout
    assert "C75" not in done.stdout + done.stderr
