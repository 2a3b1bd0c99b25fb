"""The one console line per step and the start-up report."""

from __future__ import annotations

import torch

from megatron_vl.config.load import LoadedRun
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.plan.report import flop_lines, layout_lines, parameter_lines, stage_lines
from megatron_vl.train.metrics import StepMetrics


def step_line(m: StepMetrics, total_steps: int, on_cpu: bool, planned: bool = False) -> str:
    """``step 12/300 | loss ...``: everything a step did, on one line. planned: rows follow a data plan."""
    return " | ".join(
        [
            f"step {m.step}/{total_steps}",
            f"loss {m.loss:.4f}",
            f"grad {m.grad_norm:.2f}",
            f"lr {m.lr:.2e}",
            f"tokens {human(m.tokens)}",
            f"{human(m.tokens_per_second_per_gpu)} tok/s/{'rank' if on_cpu else 'GPU'}",
            f"{m.model_tflops:.3g} TFLOP/s",
            f"MFU {m.mfu:.1%}{' of GEMM' if on_cpu else ''}",
            f"{m.images} img {m.crops} crops",
            *([f"rows {m.rows_filled:.1%} full, work x{m.work_balance:.2f}"] if planned else []),
            f"mem {m.memory_bytes / 2**30:.2f} GiB",
            f"wait {m.data_wait_seconds * 1e3:.0f} ms",
            *([f"bad {m.bad_samples}"] if m.bad_samples else []),
            *([f"skipped {m.skipped_steps}"] if m.skipped_steps else []),
            f"eta {clock(m.eta_seconds)}",
        ]
    )


def startup_report(
    loaded: LoadedRun, runtime: Runtime, backend: str, fused_kernels: str, dtype: torch.dtype, peak: float
) -> list[str]:
    """Parameters by part, cost, layout, backends in use; printed by rank 0 before the first step."""
    config = loaded.config
    unit = "measured GEMM rate, all ranks at once" if runtime.device.type == "cpu" else "dense peak"
    lines = [*parameter_lines(config.model), "", *flop_lines(config), ""]
    lines += [*layout_lines(config, runtime.layout), "", *stage_lines(config, runtime.layout), ""]
    attention = ", attention scaled_dot_product_attention" if backend == "torch" else ""
    kernels = "" if fused_kernels == "not used" else f", fused kernels {fused_kernels}"
    weights, fp8 = str(dtype).removeprefix("torch."), config.precision.fp8
    products = "" if fp8 == "none" else f", decoder products in FP8 ({fp8})"
    lines += [
        f"Device {runtime.device.type}, {weights} weights{products}, layer backend {backend}{attention}{kernels}",
        f"MFU is a share of {peak / 1e12:.4g} TFLOP/s per rank ({unit}); the tower is counted",
    ]
    return lines


def human(value: float) -> str:
    """1234567 -> 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:  # what three digits would round up to it
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """3661 -> 1h01m01s."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m{rest:02d}s" if hours else f"{minutes}m{rest:02d}s"
