"""Measured ceilings of this machine, under the names that the planner knows (fields of `plan/devices.py:Device`).

A benchmark's JSON has them under ``calibration``; `tools/plan_parallelism.py --calibrate FILE` takes that file as it
is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_vl.bench.loss import Alone
from megatron_vl.bench.timing import Timer, copy_ceiling, gemm_ceiling, product_rate
from megatron_vl.config.model import ModelConfig
from megatron_vl.ops.context_attention import attention

FEW_ROWS = 192  # tokens of a matrix product that a GPU is not filled by
GEMM_SIZE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
ROWS = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Ceilings:
    """gemm: FLOP/s of a large square product. copy: bytes/s of a large copy, read and written. The others are what the
    model's own shapes reach: matmul (a decoder layer's products), matmul_few (with FEW_ROWS tokens), attention (one
    causal document, forward and backward), element (bytes/s of an addition)."""

    gemm: float
    copy: float
    matmul: float
    matmul_few: float
    rows: int
    attention: float
    element: float

    def shown(self) -> dict[str, float]:
        """For a report: TFLOP/s and GB/s."""
        return {
            "GEMM TFLOP/s": self.gemm / 1e12,
            "copy GB/s": self.copy / 1e9,
            "decoder products TFLOP/s": self.matmul / 1e12,
            "attention TFLOP/s": self.attention / 1e12,
            "addition GB/s": self.element / 1e9,
        }

    def calibration(self) -> Mapping[str, float]:
        """For the planner. half_rows: rate(rows) = matmul_flops * rows / (rows + half_rows) through both products."""
        few, many = FEW_ROWS / self.matmul_few, self.rows / self.matmul
        full = (self.rows - FEW_ROWS) / (many - few) if many > few else self.matmul
        half = max(full * few - FEW_ROWS, 1.0)
        return {
            "matmul_flops": full,
            "half_rows": half,
            "attention_flops": self.attention,
            "element_bytes": self.element,
        }


def measured_ceilings(model: ModelConfig, timer: Timer, dtype: torch.dtype) -> Ceilings:
    """All of them, on the timer's device."""
    kind, text = timer.device.type, model.text
    shapes = [
        (text.hidden_size, (text.num_attention_heads + 2 * text.num_query_groups) * text.kv_channels),
        (text.num_attention_heads * text.kv_channels, text.hidden_size),
        (text.hidden_size, 2 * text.ffn_hidden_size),
        (text.ffn_hidden_size, text.hidden_size),
    ]

    def layer_rate(rows: int) -> float:
        work = [2.0 * rows * inner * columns for inner, columns in shapes]
        seconds = [w / product_rate(timer, dtype, rows, *shape) for w, shape in zip(work, shapes)]
        return sum(work) / sum(seconds)

    size = COPY_BYTES[kind]
    a, b = (torch.randn(size // 8, device=timer.device).to(dtype) for _ in range(2))
    added = 3.0 * a.numel() * a.element_size() / timer.median(lambda: a + b)
    return Ceilings(
        gemm=gemm_ceiling(timer, dtype, GEMM_SIZE[kind]),
        copy=copy_ceiling(timer, size),
        matmul=layer_rate(ROWS[kind]),
        matmul_few=layer_rate(FEW_ROWS),
        rows=ROWS[kind],
        attention=_attention_rate(model, timer, dtype, ROWS[kind]),
        element=added,
    )


def _attention_rate(model: ModelConfig, timer: Timer, dtype: torch.dtype, tokens: int) -> float:
    """FLOP/s of one causal document, forward and backward, counted as `plan/cost.py` counts: 3 times the forward."""
    text = model.text
    q, k, v = (
        torch.randn(tokens, n, text.kv_channels, device=timer.device, dtype=torch.float32)
        .to(dtype)
        .requires_grad_()
        for n in (text.num_attention_heads, text.num_query_groups, text.num_query_groups)
    )
    slope = torch.randn_like(q)

    def run() -> None:
        out = attention(q, k, v, (0, tokens), text.kv_channels**-0.5, True, Alone(), "p2p")
        torch.autograd.grad(out, (q, k, v), slope)

    flops = 3 * 2.0 * text.num_attention_heads * text.kv_channels * tokens**2
    return flops / timer.median(run)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
