"""Tables of devices, and measured values in their place."""

import json

import pytest

from megatron_vl.bench.calibration import Ceilings
from megatron_vl.errors import ConfigError
from megatron_vl.plan.cost import PEAK_FLOPS
from megatron_vl.plan.devices import DEVICES, device_of


def test_tables():
    assert set(DEVICES) == {"H100", "H200", "A100", "CPU"}
    for name in ("H100", "H200", "A100"):
        assert DEVICES[name].peak_flops == PEAK_FLOPS[name]["bf16"]
    assert DEVICES["H200"].memory > DEVICES["H100"].memory
    assert DEVICES["CPU"].on_cpu and not DEVICES["A100"].on_cpu
    for device in DEVICES.values():
        assert device.attention_flops < device.matmul_flops < device.peak_flops


def test_measured_values_replace_nominal_ones(tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"matmul_flops": 7.0e14, "node_ranks": 4, "layer_seconds": 0}))
    device = device_of("H100", str(file))
    assert (device.matmul_flops, device.node_ranks, device.layer_seconds) == (7.0e14, 4, 0.0)
    assert device.attention_flops == DEVICES["H100"].attention_flops


def test_a_benchmarks_file_is_a_calibration(tmp_path):
    """Every field that `benchmark_throughput.py` measures is one of the planner's; its rows are not looked at."""
    file = tmp_path / "kernels.json"
    ceilings = Ceilings(
        gemm=8e14, copy=4e12, matmul=7e14, matmul_few=3e14, rows=8192, attention=5e14, element=3e12
    )
    calibration = ceilings.calibration()
    file.write_text(json.dumps({"rows": [1], "calibration": calibration}))
    device = device_of("H200", str(file))
    assert {name: getattr(device, name) for name in calibration} == calibration
    # through both measured points: rate = matmul_flops * rows / (rows + half_rows)
    for rows, rate in ((8192, 7e14), (192, 3e14)):
        assert device.matmul_flops * rows / (rows + device.half_rows) == pytest.approx(rate)
    file.write_text(json.dumps({"calibration": [1]}))
    with pytest.raises(ConfigError, match="must be an object"):
        device_of("H200", str(file))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "must be an object"),
        ('{"matmul_flop": 1.0}', "matmul_flop = 1.0"),
        ('{"matmul_flops": 0}', "must be a positive number"),
        ('{"name": "B200"}', "name = B200"),
        ('{"memory": "80G"}', "memory = 80G"),
        ('{"intra_bytes": true}', "intra_bytes = True"),
        ('{"element_bytes": NaN}', "element_bytes = nan"),
        ('{"node_ranks": 0}', "node_ranks = 0"),
        ('{"node_ranks": 0.5}', "node_ranks = 0.5: must be a whole number"),
        ('{"processors": 4}', "processors = 4: no rank of a GPU shares cores"),
        (
            '{"machine": {"device": "CPU, one thread"}, "calibration": {"matmul_flops": 1e9}}',
            "was measured on CPU",
        ),
        (
            '{"machine": {"device": "NVIDIA H100 80GB HBM3"}, "calibration": {"matmul_flops": 1e9}}',
            "on NVIDIA H100",
        ),
        ('{"machine": {}, "calibration": {}}', "holds no measured value"),
        ('{"step_seconds": 1.0, "mfu": 0.4}', "step_seconds = 1.0"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, told):
    file = tmp_path / "measured.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        device_of("A100", str(file))


def test_a_file_of_the_same_kind_of_device_is_taken(tmp_path):
    file = tmp_path / "measured.json"

    def read(table: str, machine: str, **values: float):
        file.write_text(json.dumps({"machine": {"device": machine}, "calibration": values}))
        return device_of(table, str(file))

    assert read("A100", "NVIDIA A100-SXM4-80GB", node_ranks=16.0).node_ranks == 16
    assert read("H100", "NVIDIA H100 PCIe", matmul_flops=4e14).matmul_flops == 4e14  # which has no table
    assert read("H100", "NVIDIA L40S", matmul_flops=2e14).matmul_flops == 2e14
    assert read("CPU", "CPU, 8 cores", processors=8).processors == 8
    for table, machine, values in (
        ("CPU", "NVIDIA L40S", {"matmul_flops": 2e14}),
        ("CPU", "CPU, 8 cores", {"processors": 0}),
    ):
        with pytest.raises(ConfigError):
            read(table, machine, **values)


def test_an_unknown_device_or_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="choose one of H100, H200, A100, CPU"):
        device_of("V100")
    with pytest.raises(ConfigError, match="cannot be read"):
        device_of("H100", str(tmp_path / "nothing.json"))
