"""The table of operations: every way of each gives the same; a wrong one is found; what is missing says why."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_vl.bench import kernels, operations
from megatron_vl.bench.operations import KINDS, OPERATIONS, Size, document_lengths, kernel
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.plan.cost import decoder_layer_flops, view_flops
from megatron_vl.plan.devices import device_of
from tools.benchmark_throughput import main

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_agree(name, kind):
    torch.manual_seed(1)
    work = OPERATIONS[name](Size(STEP3_VL_TINY, 3, kind, 96, CPU, torch.float32))
    first, *others = (kernels.once(way, work) for way in work.ways.values())
    assert all(torch.isfinite(result).all() for result in first) and work.nbytes > 0
    for other in others:
        assert len(other) == len(first)
        assert max(map(kernels.difference, other, first)) < kernels.OFF[torch.float32]
    assert "ours" in work.ways or work.missing["ours"]


def test_counts_are_those_of_the_cost_model():
    size = Size(STEP3_VL_TINY, 3, KINDS[0], 96, CPU, torch.float32)
    flops = view_flops(STEP3_VL_TINY, KINDS[0])
    assert OPERATIONS["projector"](size).flops == 3 * (flops["downsamplers"] + flops["projector"])
    lengths = document_lengths(96)
    assert sum(lengths) == 96 and len(set(lengths)) > 3
    assert OPERATIONS["packed_attention"](size).flops == decoder_layer_flops(STEP3_VL_TINY, lengths)[1]


def test_the_command(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    small = ["kernels", "--views", "1", "--repeats", "1", "--only", "bias_quick_gelu", "packed_attention"]
    assert main([*small, "--json", str(file)]) == 0
    text, record = capsys.readouterr().out, json.loads(file.read_text())
    assert "GEMM" in text and {row["operation"] for row in record["rows"]} == {
        "bias_quick_gelu",
        "packed_attention",
    }
    device = device_of("CPU", str(file))
    assert device.matmul_flops == record["calibration"]["matmul_flops"] > 0


def test_a_wrong_way_is_found(monkeypatch, capsys):
    """Planted: an operation one of whose ways drops the bias."""

    def wrong(size):
        work = operations.bias_quick_gelu(size)
        return replace(work, ways=work.ways | {"wrong": lambda x, bias: operations.quick_gelu(x + 0 * bias)})

    monkeypatch.setitem(OPERATIONS, "bias_quick_gelu", wrong)
    assert main(["kernels", "--views", "1", "--repeats", "1", "--only", "bias_quick_gelu"]) == 1
    assert "wrong" in capsys.readouterr().out


def test_a_missing_kernel_says_why_and_can_be_an_error():
    size = Size(STEP3_VL_TINY, 1, KINDS[0], 96, CPU, torch.float32)
    found, missing = kernel(size, "no_such_operator", lambda operator: operator)
    assert not found and missing["ours"]


def test_nothing_finite_is_never_equal():
    bad = torch.tensor([1.0, float("nan")])
    assert kernels.difference(bad, torch.ones(2)) == float("inf")
