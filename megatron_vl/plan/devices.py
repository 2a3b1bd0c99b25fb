"""What a rank runs on: memory, rates of work and of links. Nominal values, or measured ones from a file.

Peaks, memory and links are from NVIDIA's data sheets of the SXM modules in HGX / DGX nodes of eight. Efficiencies and
latencies are assumptions, chosen so that published bf16 figures of 8B decoders on H100 come out (spec of this
project: 40-50% MFU); products in FP8 are taken to reach less of their peak (55%, bf16 62%), since they have half the
time to be fed. None was measured here. `--calibrate FILE` replaces any of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.plan.cost import PEAK_FLOPS, listed_name
from megatron_vl.plan.fp8 import BLOCKWISE_CUDA, refusal
from megatron_vl.plan.kernels import HOPPER

GB, GIB = 10**9, 1 << 30
GPU_ONLY = ("transformer_engine", "a2a", "fa3", "fa4")  # layers, exchange of K and V, kernels


@dataclass(frozen=True)
class Device:
    """One rank's device. Rates per second and rank; links are one direction.

    memory: bytes that a process may use, 0 = no limit is known. matmul_flops, attention_flops: reached, not peak, and
    half of it with `half_rows` tokens per rank and micro-batch. matmul_flops_fp8: the same of products in FP8, without
    what rounding to it takes; 0 = it has none, and they count as any other.
    element_bytes: memory traffic of element-wise work. intra_bytes: link inside a node; inter_bytes: a rank's own
    share of the links between nodes. collective_seconds, transfer_seconds: latency of a collective inside a node and
    of a message between two ranks; inter_seconds: of a collective between nodes. layer_seconds: fixed cost of one
    layer's forward pass (launches). host_bytes: link to host memory. processors: cores that all ranks of a node share,
    0 = every rank has its own device. reserve: bytes that libraries, the context and fragmentation take. capability: of
    CUDA, None = not a GPU.
    """

    name: str
    memory: int
    peak_flops: float
    matmul_flops: float
    matmul_flops_fp8: float
    attention_flops: float
    half_rows: float
    element_bytes: float
    node_ranks: int
    intra_bytes: float
    inter_bytes: float
    collective_seconds: float
    inter_seconds: float
    transfer_seconds: float
    layer_seconds: float
    host_bytes: float
    processors: int
    reserve: int
    capability: tuple[int, int] | None

    @property
    def on_cpu(self) -> bool:
        """Whether ranks are processes that share cores."""
        return self.processors > 0


def _gpu(
    name: str, memory: int, bandwidth: float, link: float, network: float, host: float, capability: tuple[int, int]
) -> Device:  # fmt: skip
    """bandwidth, link, network, host: bytes per second, nominal."""
    peak, peak_fp8 = PEAK_FLOPS[name]["bf16"], PEAK_FLOPS[name].get("fp8", 0.0)
    return Device(
        name=name, memory=memory, peak_flops=peak, matmul_flops=0.62 * peak, matmul_flops_fp8=0.55 * peak_fp8,
        attention_flops=0.45 * peak, half_rows=192, element_bytes=0.75 * bandwidth, node_ranks=8,
        intra_bytes=0.75 * link, inter_bytes=0.8 * network, collective_seconds=12e-6, inter_seconds=40e-6,
        transfer_seconds=15e-6, layer_seconds=0.0, host_bytes=0.8 * host, processors=0, reserve=4 * GIB,
        capability=capability,
    )  # fmt: skip


DEVICES: dict[str, Device] = {
    "H100": _gpu("H100", 79 * GIB, 3.35e12, 450 * GB, 50 * GB, 64 * GB, HOPPER),
    "H200": _gpu("H200", 139 * GIB, 4.8e12, 450 * GB, 50 * GB, 64 * GB, HOPPER),
    "A100": _gpu("A100", 79 * GIB, 2.039e12, 300 * GB, 25 * GB, 32 * GB, (8, 0)),
    # a laptop's or a test machine's core with torch in fp32: order of magnitude only
    "CPU": Device(
        name="CPU", memory=0, peak_flops=60e9, matmul_flops=40e9, matmul_flops_fp8=0.0, attention_flops=15e9,
        half_rows=8,
        element_bytes=6 * GB, node_ranks=1024, intra_bytes=1.5 * GB, inter_bytes=1 * GB, collective_seconds=250e-6,
        inter_seconds=500e-6, transfer_seconds=150e-6, layer_seconds=1.2e-3, host_bytes=3 * GB, processors=2,
        reserve=GIB // 2, capability=None,
    ),
}  # fmt: skip


def why_not(config: RunConfig, device: Device) -> str | None:
    """Why a run cannot have on this device what it asks for by name; None = it can.

    The rules are those with which it is built there; CUDA is taken to be new enough.
    """
    parallel = config.parallel
    backend = {"auto": "transformer_engine"}.get(parallel.layer_backend, parallel.layer_backend)
    if device.on_cpu:
        backend = "torch"
        for name, usual in (
            ("layer_backend", "torch"),
            ("cp_comm_type", "p2p"),
            ("flash_attention", "built_in"),
        ):
            if getattr(parallel, name) in GPU_ONLY:
                return (
                    f"{device.name}: parallel.{name} = {getattr(parallel, name)}: needs a CUDA device, and the layers "
                    f"of a CPU are torch's; use {usual}"
                )
    reason = refusal(config.precision, backend, device.capability, BLOCKWISE_CUDA)
    if reason is not None:
        return f"{device.name}: {reason}"
    if parallel.fused_kernels == "required" and not device.on_cpu and device.capability != HOPPER:
        return f"{device.name}: parallel.fused_kernels = required: the kernels are for compute capability 9.0; use auto"
    return None


def device_of(name: str, *calibrations: str) -> Device:
    """The device by its name in `DEVICES`, with the values of calibration files put in, those of later files last.

    calibrations: files as `measured_values` takes them. Raises ConfigError, also for a file that was measured on a
    device of another table.
    """
    if name not in DEVICES:
        raise ConfigError(f"gpu = {name}: no such table; choose one of {', '.join(DEVICES)}")
    device = DEVICES[name]
    for file in calibrations:
        values, machine = _read(file)
        if machine is not None and not _may_be(machine, device):
            raise ConfigError(
                f"calibrate = {file}: was measured on {machine}; give one of a {name}, or another --gpu"
            )
        if "processors" in values and (values["processors"] > 0) != device.on_cpu:
            rule = (
                "ranks share cores, at least one"
                if device.on_cpu
                else "no rank of a GPU shares cores with others"
            )
            raise ConfigError(
                f"calibrate = {file}: processors = {values['processors']}: {rule}; leave it out"
            )
        device = replace(device, **values)
    return device


def measured_values(file: str) -> Mapping[str, float]:
    """What a calibration file says: fields of `Device` and their values.

    file: JSON object of field names of `Device` (not `name`, `capability`) and numbers; other keys are refused. Or what
    `tools/benchmark_throughput.py kernels` or `collectives` has written, which holds such an object under
    `calibration`. Raises ConfigError: there is no such file or value in it, or one that cannot be.
    """
    return _read(file)[0]


def _read(file: str) -> tuple[Mapping[str, float], str | None]:
    """(values, name of the device they were measured on, where the file says it)."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"calibrate = {file}: cannot be read as JSON ({error}); give the benchmark's file"
        ) from error
    machine = None
    if isinstance(found, dict) and "calibration" in found:
        about = found.get("machine")
        machine = str(about["device"]) if isinstance(about, dict) and "device" in about else None
        found = found["calibration"]
    if not isinstance(found, dict):
        raise ConfigError(f"calibrate = {file}: must be an object of names and numbers")
    if not found:
        raise ConfigError(
            f"calibrate = {file}: holds no measured value; `collectives` needs --nproc 2 or more for one"
        )
    return {key: _value(file, key, value) for key, value in found.items()}, machine


def _value(file: str, key: str, value: object) -> float:
    kinds = {one.name: one.type for one in fields(Device) if one.name not in ("name", "capability")}
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if key not in kinds or not number or value < 0 or (value == 0 and not _may_be_zero(key)):
        raise ConfigError(
            f"calibrate = {file}: {key} = {value}: must be a positive number for one of {', '.join(kinds)}"
        )
    if kinds[key] == "int" and value != int(value):
        raise ConfigError(f"calibrate = {file}: {key} = {value}: must be a whole number; round it")
    return int(value) if kinds[key] == "int" else float(value)


def _may_be_zero(key: str) -> bool:
    """Latencies, and what zero has a meaning for."""
    return "seconds" in key or key in ("memory", "processors", "reserve")


def _may_be(machine: str, device: Device) -> bool:
    """Whether a table is that of a device with the name that a benchmark has written. Of GPUs those without a table may
    be planned with any GPU's and their own values."""
    if machine.startswith("CPU"):
        return device.on_cpu
    return not device.on_cpu and listed_name(machine) in (device.name, *{*PEAK_FLOPS} - {*DEVICES}, None)
