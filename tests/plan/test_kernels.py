"""Which kernels a run has on which device, and what they take."""

from dataclasses import replace

import pytest

from megatron_vl.config.schema import DataConfig, ParallelConfig, PrecisionConfig, RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.plan.devices import DEVICES, device_of, why_not
from megatron_vl.plan.kernels import HOPPER, kernels_of, kernels_of_run, uses_fused


@pytest.mark.parametrize(
    ("choice", "capability", "expected"),
    [
        ("auto", HOPPER, True),
        ("auto", (8, 0), False),
        ("auto", (10, 0), False),
        ("auto", None, False),  # a CPU
        ("never", HOPPER, False),
        ("required", HOPPER, True),
        ("required", None, True),  # their CPU form
    ],
)
def test_who_uses_the_kernels(choice, capability, expected):
    assert uses_fused(ParallelConfig(fused_kernels=choice), capability) == expected


def test_of_a_run():
    config = RunConfig(
        parallel=ParallelConfig(projector_kernel="implicit"),
        precision=PrecisionConfig(fp8="tensorwise", fp8_vision=True, num_layers_at_start_in_bf16=2),
        data=DataConfig(image_mode="fast"),
    )
    found = kernels_of_run(config, 2, on_cpu=False)
    assert found.fused and found.projector == "implicit" and found.pixel == 1
    assert (
        found.fp8 == frozenset(range(2, 36))
        and found.fp8_vision
        and found.fused_norm
        and not found.joined_rows
    )
    ampere = kernels_of_run(config, 2, on_cpu=False, capability=(8, 0))
    assert not ampere.fused and ampere.projector == "torch"
    assert (
        not kernels_of_run(config, 4, on_cpu=True).fused
        and kernels_of_run(RunConfig(), 4, on_cpu=True).pixel == 4
    )


def test_rows_that_a_kernel_takes():
    """The rule of `ops/library.py:uses_kernels`: multiples of 16 bytes, no more than a block holds."""
    bf16 = kernels_of("torch", 2, on_cpu=False, fused=True)
    assert bf16.takes(8) and not bf16.takes(12) and replace(bf16, element=4).takes(12)
    assert bf16.takes(3072, 6144) and not bf16.takes(3080, 6144)
    assert not replace(bf16, fused=False).takes(8)


@pytest.mark.parametrize(
    ("device", "precision", "parallel", "told"),
    [
        ("A100", {"fp8": "tensorwise"}, {}, "A100: precision.fp8 = tensorwise: needs compute capability 8.9"),
        ("CPU", {"fp8": "blockwise"}, {}, "the torch layers have one scale per tensor"),
        (
            "H100",
            {"fp8": "blockwise"},
            {"layer_backend": "torch"},
            "the torch layers have one scale per tensor",
        ),
        ("A100", {}, {"fused_kernels": "required"}, "the kernels are for compute capability 9.0; use auto"),
        ("H200", {"fp8": "blockwise"}, {"fused_kernels": "required"}, None),
        ("CPU", {"fp8": "tensorwise"}, {"fused_kernels": "required"}, None),
        ("A100", {}, {}, None),
    ],
)
def test_what_a_device_cannot_do(device, precision, parallel, told):
    config = RunConfig(precision=PrecisionConfig(**precision), parallel=ParallelConfig(**parallel))
    found = why_not(config, DEVICES[device])
    assert found is None if told is None else told in found


def test_capability_is_not_measured(tmp_path):
    file = tmp_path / "measured.json"
    file.write_text('{"matmul_flops_fp8": 9e14, "host_bytes": 4e10}')
    device = device_of("H100", str(file))
    assert (device.matmul_flops_fp8, device.host_bytes, device.capability) == (9e14, 4e10, HOPPER)
    file.write_text('{"capability": 9}')
    with pytest.raises(ConfigError, match="capability = 9"):
        device_of("H100", str(file))
