"""Are two sets of weights the same, tensor by tensor: names, shapes, number formats, bits."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_vl.checkpoint.digests import Digested, digest, read_digests
from megatron_vl.checkpoint.hf_save import IN_FLIGHT_BYTES, Gate
from megatron_vl.checkpoint.meter import Figures, Meter
from megatron_vl.checkpoint.safetensors_file import DTYPE_NAMES
from megatron_vl.checkpoint.torch_dist import matrix_shape
from megatron_vl.checkpoint.weights import Weight, open_weights

Side = Mapping[str, Weight] | Mapping[str, Digested]
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Comparison:
    """differences: one sentence per tensor that differs, by name. figures: of what was read on one side."""

    differences: list[str] = field(default_factory=list)
    figures: Figures = field(default_factory=lambda: Figures(0, 0, 0, 0.0, 0))


def open_side(path: Path) -> Side:
    """Weights of a folder, or the digests in a file.

    Raises:
        CheckpointError: neither.
    """
    return read_digests(path) if path.is_file() else open_weights(path).weights


def compare(left: Side, right: Side, threads: int = 2, quiet: bool = False) -> Comparison:
    """Read both sides block by block. Digests are compared where one side has only those."""
    found = {name: f"missing on the right: {name}" for name in left if name not in right}
    found |= {name: f"missing on the left: {name}" for name in right if name not in left}
    common = sorted(left.keys() & right.keys())
    total = sum(left[name].spec.nbytes for name in common)
    gate = Gate(IN_FLIGHT_BYTES)

    def one(name: str) -> str:
        held = sum(s[name].held for s in (left, right) if isinstance(s[name], Weight))
        with gate.holding(held):
            return difference(left[name], right[name], meter)

    with Meter("verify", total, quiet=quiet) as meter, ThreadPoolExecutor(max_workers=threads) as pool:
        for name, sentence in zip(common, pool.map(one, common)):
            if sentence:
                found[name] = sentence
    elements = sum(left[name].spec.nbytes // left[name].spec.dtype.itemsize for name in common)
    figures = Figures(len(common), elements, total, meter.seconds, meter.peak)
    return Comparison([found[name] for name in sorted(found)], figures)


def difference(left: Weight | Digested, right: Weight | Digested, meter: Meter) -> str:
    """How the right tensor differs from the left one; "" when it does not."""
    a, b = left.spec, right.spec
    if a.shape != b.shape:
        meter.add(a.nbytes)
        return f"shape: {a.name} is {list(a.shape)} and {list(b.shape)}"
    formats = (
        "" if a.dtype == b.dtype else f"dtype: {a.name} is {DTYPE_NAMES[a.dtype]} and {DTYPE_NAMES[b.dtype]}"
    )
    if isinstance(left, Weight) and isinstance(right, Weight):
        values = _value_difference(left, right, meter)
        if formats:
            return f"{formats}; {values or 'equal values'}"
        return f"values: {a.name}: {values}" if values else ""
    if formats:  # digests of different formats say nothing about each other
        meter.add(a.nbytes)
        return formats
    one, other = (s.sha256 if isinstance(s, Digested) else digest(s, meter.add).sha256 for s in (left, right))
    return "" if one == other else f"values: {a.name}: the digests differ"


def _value_difference(left: Weight, right: Weight, meter: Meter) -> str:
    """Count and size of the values that differ in their bits (of different formats: in their value)."""
    unequal, largest, relative = 0, 0.0, 0.0
    for first, count in left.blocks():
        a, b = left.rows(first, count), right.rows(first, count)
        meter.add(a.nbytes)
        differs = _differs(a, b)
        number = int(differs.sum())
        if not number:
            continue
        unequal += number
        x, y = a[differs].double(), b[differs].double()
        gap = (x - y).abs()
        size = torch.maximum(x.abs(), y.abs())
        largest = max(largest, gap.nan_to_num(torch.inf, torch.inf).max().item())
        share = torch.where(size == 0, 0.0, gap / size)
        relative = max(relative, share.nan_to_num(torch.inf, torch.inf).max().item())
    if not unequal:
        return ""
    rows, columns = matrix_shape(left.spec.shape)
    return (
        f"{unequal:,} of {rows * columns:,} differ, largest difference {largest:.3g}, largest relative difference "
        f"{relative:.3g}"
    )


def _differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype == b.dtype:
        integer = INTEGERS[a.dtype.itemsize]
        return a.contiguous().view(integer) != b.contiguous().view(integer)
    return a.double() != b.double()


def digests_of(weights: Mapping[str, Weight], threads: int = 2, quiet: bool = False) -> dict[str, Digested]:
    """The digest of every weight, read block by block."""
    gate = Gate(IN_FLIGHT_BYTES)
    total = sum(weight.spec.nbytes for weight in weights.values())

    def one(name: str) -> Digested:
        with gate.holding(weights[name].held):
            return digest(weights[name], meter.add)

    with Meter("digest", total, quiet=quiet) as meter, ThreadPoolExecutor(max_workers=threads) as pool:
        return dict(zip(weights, pool.map(one, weights)))
