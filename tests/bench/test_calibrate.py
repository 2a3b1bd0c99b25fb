"""`--calibrate FILE` of both planning commands, with the files that the benchmarks write."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.__main__ import main as package
from megatron_vl.bench.measured import main as tool
from megatron_vl.errors import ConfigError
from megatron_vl.plan.devices import DEVICES, device_of
from tests.bench.on_ranks import collectives_on_rank
from tools import benchmark_throughput

OPTIONS = ["--gpu", "CPU", "--gpus", "2"]
YAML = "preset: step3_vl_tiny\ndata: {seq_length: 256}\ntrain: {global_batch_size: 8}\n"
KERNELS = ["kernels", "--views", "1", "--repeats", "1", "--only", "bias_quick_gelu"]
OF_KERNELS = {"matmul_flops", "half_rows", "attention_flops", "element_bytes"}
OF_LINKS = {"intra_bytes", "collective_seconds", "transfer_seconds"}


@pytest.fixture(scope="module")
def files(world, tmp_path_factory) -> dict[str, Path]:
    """What `kernels` writes, and `collectives` on two ranks."""
    folder = tmp_path_factory.mktemp("measured")
    assert benchmark_throughput.main([*KERNELS, "--json", str(folder / "kernels.json")]) == 0
    record = world.run(2, collectives_on_rank, [4, 64], 1)[0]
    benchmark_throughput.write_json(folder / "collectives.json", record)
    return {"kernels": folder / "kernels.json", "collectives": folder / "collectives.json"}


@pytest.fixture
def plan(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(YAML)
    return lambda *options: package(["plan", str(run), *OPTIONS, *options])


@pytest.fixture
def search(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(YAML)
    return lambda *options: tool([str(run), *OPTIONS, "--top", "1", *options], [])


@pytest.mark.parametrize("name", ["plan", "search"])
def test_measured_values_replace_the_tables(files, capsys, request, name):
    command = request.getfixturevalue(name)
    assert command() == 0
    nominal = capsys.readouterr().out
    assert "Measured" not in nominal and "products at 0.04, attention at 0.015 TFLOP/s" in nominal
    assert command("--calibrate", str(files["kernels"]), "--calibrate", str(files["collectives"])) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    for line, name, keys in ((first, "kernels", OF_KERNELS), (second, "collectives", OF_LINKS)):
        found = json.loads(files[name].read_text())["calibration"]
        assert set(found) == keys and str(files[name]) in line and "(in brackets the CPU table's)" in line
        for key, value in found.items():
            assert f"{key} {value:.4g} ({getattr(DEVICES['CPU'], key):.4g})" in line
    assert "products at 0.04," not in rest[1] and rest[2:] != nominal.splitlines()[2:]


def test_all_that_both_measure_is_taken(files):
    device = device_of("CPU", *map(str, files.values()))
    measured = {
        key: value
        for file in files.values()
        for key, value in json.loads(file.read_text())["calibration"].items()
    }
    assert device == replace(DEVICES["CPU"], **measured) != DEVICES["CPU"]


def test_a_later_file_wins(files, tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{"matmul_flops": 1e13}')
    assert device_of("CPU", str(files["kernels"]), str(own)).matmul_flops == 1e13
    assert device_of("CPU", str(own), str(files["kernels"])).matmul_flops != 1e13


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ('{"layout": "TP1", "rows": []}', "layout = TP1"),
        ('{"calibration": {}}', "holds no measured value"),
        ('{"calibration": {"matmul": 1e12}}', "matmul = 1"),
    ],
)
def test_a_wrong_file_ends_both_commands(plan, search, tmp_path, capsys, content, told):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    assert plan("--calibrate", str(file)) == 2
    assert f"calibrate = {file}: {told}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="calibrate = "):
        search("--calibrate", str(file))
