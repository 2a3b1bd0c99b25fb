"""The bodies of the kernels, through their CPU form: values, gradients, what PyTorch is told of them, refusals."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.ops import library
from megatron_vl.ops.activation import bias_quick_gelu, quick_gelu
from megatron_vl.ops.pixels import embedding_patches, normalised, patchify
from megatron_vl.ops.residual import scale_residual_norm
from megatron_vl.ops.rotary import rotary_table
from tests.csrc.cases import activation, draw, errors, residual, residual_norm, rotary

CPU = torch.device("cpu")
CASES = {
    "activation": activation(9, 3, 40),
    "activation of one row": activation(1, 1, 8),
    "residual": residual(9, 3, 40),
    "residual and norm": residual_norm(7, 3, 48),
    "residual and norm at the released width": residual_norm(2, 1, 1536),
    "rotary": rotary(5, 3, 2, 16, CPU),
    "rotary at the released width of a head": rotary(2, 1, 3, 96, CPU),
}
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_their_definition(kernels, name, dtype):
    found = errors(CASES[name], dtype, CPU)
    assert max(found) < LIMITS[dtype], found


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_twins_equal_the_definition(name, dtype):
    found = errors(CASES[name], dtype, CPU)
    # a chain of bf16 operations rounds more often than a kernel
    assert max(found) < LIMITS[dtype] * (4 if dtype == torch.bfloat16 else 1), found


def test_a_wrong_kernel_would_be_seen(kernels):
    """One constant of the definition is changed a little: outputs and gradients are off by more than may be."""

    def wrong(x, bias):
        u = x + bias
        return (u / (1 + (-1.7 * u).exp()),)

    found = errors(replace(CASES["activation"], define=wrong), torch.float32, CPU)
    assert min(found) > 10 * LIMITS[torch.float32], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "height", "width", "patch"), [(3, 28, 42, 14), (1, 8, 4, 2)])
def test_bytes_become_the_same_patches(kernels, dtype, n, height, width, patch):
    """Equal to the bit: the kernel rounds where the twin does."""
    pixels = torch.randint(256, (n, 3, height, width), dtype=torch.uint8)
    ours = embedding_patches(pixels, torch.empty(1, dtype=dtype), patch)
    assert torch.equal(ours, patchify(normalised(pixels, dtype), patch))


def test_floats_are_normalised_already(kernels):
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(embedding_patches(pixels, torch.empty(1), 14), patchify(pixels, 14))


def arguments() -> dict[str, tuple]:
    """An operator of the library -> inputs for PyTorch's own checks."""
    plain = {name: draw(CASES[name], torch.float32, CPU, 0) for name in ("activation", "residual", "rotary")}
    norm = draw(CASES["residual and norm"], torch.float32, CPU, 0)
    still = [t.detach() for t in norm]
    statistics = [torch.rand(7, 3) + 0.5 for _ in range(2)]
    qkv, table = plain["rotary"][0], rotary_table(5, 16, 10000.0, CPU)
    heads = [torch.randn(3, 25, 2, 16) for _ in range(3)]
    x, bias, gamma, left = (t.detach() for t in plain["residual"])
    u, shift = (t.detach() for t in plain["activation"])
    pixels = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    return {
        "bias_quick_gelu": tuple(plain["activation"]),
        "bias_quick_gelu_backward": (u, u, shift),
        "scale_residual": tuple(plain["residual"]),
        "scale_residual_backward": (left, x, bias, gamma),
        "scale_residual_norm": (*norm, 1e-5),
        "scale_residual_norm_backward": (
            still[0], still[3], still[0], still[1], still[2], still[4], still[3], *statistics
        ),
        "rope_2d": (qkv, table),
        "rope_2d_backward": (*heads, table),
        "patchify": (pixels, torch.rand(3), torch.rand(3) + 0.1, 14, True),
    }  # fmt: skip


def test_opcheck(kernels):
    """Schemas, fake tensors, registered gradients, and tracing through the autograd dispatcher."""
    torch.use_deterministic_algorithms(False)  # the tracer compares two runs by their bits
    for name, given in arguments().items():
        torch.library.opcheck(getattr(torch.ops.megatron_vl, name).default, given)


def test_every_operator_of_the_family_is_checked(kernels):
    known = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "megatron_vl::" in name}
    family = {name for name in known if "projector" not in name}
    assert family == set(arguments())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.bias_quick_gelu(torch.ones(2, 3), torch.ones(3)), "multiple of 16 bytes"),
        (lambda op: op.bias_quick_gelu(torch.ones(2, 8), torch.ones(4)), "one value per column"),
        (
            lambda op: op.bias_quick_gelu(torch.ones(2, 8), torch.ones(8).bfloat16()),
            "bias has another format",
        ),
        (lambda op: op.bias_quick_gelu(torch.ones(8, 2).t(), torch.ones(8)), "must be contiguous"),
        (lambda op: op.bias_quick_gelu(torch.ones(17)[1:].view(2, 8), torch.ones(8)), "start at a multiple"),
        (lambda op: op.bias_quick_gelu(torch.ones(2, 8).double(), torch.ones(8).double()), "takes bfloat16"),
        (lambda op: op.rope_2d(torch.ones(4, 1, 2, 12), torch.ones(4, 4, 2)), "table must have 16 values"),
        (
            lambda op: op.patchify(torch.ones(1, 3, 4, 4), torch.ones(3), torch.ones(3), 2, True),
            "must be uint8",
        ),
    ],
)
def test_refusals(kernels, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.megatron_vl)


def test_what_does_not_fit_goes_to_the_twin(kernels):
    narrow, bias = torch.randn(2, 6), torch.randn(6)
    assert torch.equal(bias_quick_gelu(narrow, bias), quick_gelu(narrow + bias))
    wide = [torch.randn(2, 4096) if i in (0, 3) else torch.randn(4096) for i in range(6)]
    assert not library.uses_kernels(wide[0], 4096, at_most=6144)
    assert scale_residual_norm(*wide, 1e-5)[1].isfinite().all()
    assert bias_quick_gelu(narrow.double(), bias.double()).dtype == torch.float64
