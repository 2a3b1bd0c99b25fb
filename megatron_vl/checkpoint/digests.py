"""Digests of tensors: computed while values are moved, compared later without the other side's 20 GB.

The digest of a tensor is the sha256 over the sha256 of each of its blocks (checkpoint/weights.py, `row_blocks`: whole
rows, at most 16 MiB), so that blocks may be done in any order and by any thread. It covers values only; names, shapes
and number formats are compared by themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vl.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES, TensorSpec, bytes_of
from megatron_vl.checkpoint.weights import Weight, row_blocks
from megatron_vl.errors import CheckpointError

FORMAT = "megatron_vl tensor digests 1"


@dataclass(frozen=True)
class Digested:
    """What a digest file says about a tensor."""

    spec: TensorSpec
    sha256: str


class Digests:
    """Collects blocks' digests from any thread; a tensor's own once all of its blocks are in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[str, dict[int, bytes]] = {}
        self._specs: dict[str, TensorSpec] = {}

    def add(self, spec: TensorSpec, first: int, values: torch.Tensor) -> None:
        """One block, which starts at row ``first``."""
        digest = hashlib.sha256(bytes_of(values)).digest()
        with self._lock:
            self._specs[spec.name] = spec
            self._blocks.setdefault(spec.name, {})[first] = digest

    def of(self, name: str) -> str:
        """The digest of a tensor, in hexadecimal digits."""
        blocks, starts = self._blocks[name], [first for first, _ in row_blocks(self._specs[name])]
        assert sorted(blocks) == starts, f"{name}: blocks {sorted(blocks)} of {starts}"
        return hashlib.sha256(b"".join(blocks[first] for first in starts)).hexdigest()

    def collected(self) -> dict[str, Digested]:
        """Every tensor seen so far; all of their blocks must be in."""
        return {name: Digested(self._specs[name], self.of(name)) for name in sorted(self._blocks)}


def digest(weight: Weight, on_bytes: Callable[[int], None] | None = None) -> Digested:
    """Read a whole weight and digest it."""
    digests = Digests()
    for first, count in weight.blocks():
        values = weight.rows(first, count)
        digests.add(weight.spec, first, values)
        if on_bytes is not None:
            on_bytes(values.nbytes)
    return Digested(weight.spec, digests.of(weight.spec.name))


def to_plain(digests: Mapping[str, Digested]) -> dict[str, Any]:
    """As JSON can hold it."""
    return {
        name: {"dtype": DTYPE_NAMES[d.spec.dtype], "shape": list(d.spec.shape), "sha256": d.sha256}
        for name, d in sorted(digests.items())
    }


def from_plain(tensors: Mapping[str, Any]) -> dict[str, Digested]:
    """The inverse of `to_plain`. Raises KeyError, TypeError, ValueError for anything else."""
    return {
        name: Digested(
            TensorSpec(name, DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])),
            str(entry["sha256"]),
        )
        for name, entry in tensors.items()
    }


def write_digests(path: Path, digests: Mapping[str, Digested]) -> None:
    """Write a digest file; it is on the disk when this returns.

    Raises:
        OSError: it cannot be written.
    """
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "tensors": to_plain(digests)}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_digests(path: Path) -> dict[str, Digested]:
    """Read a digest file.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return from_plain(content["tensors"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a digest file ({error!r}); write one with: convert_checkpoint.py inspect DIR "
            "--digests FILE"
        ) from error
