"""Weights wherever they lie, read block by block: what every conversion and comparison works on.

A `Weight` knows its released name, shape and number format, and reads any rows of its matrix (the tensor flattened
behind its first axis). Sources make dictionaries of them: a Hugging Face folder, a checkpoint folder, parts of
others, random numbers. Sinks (checkpoint/convert.py) write them block by block, so that memory does not depend on
the size of a tensor.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_vl.checkpoint.folder import find
from megatron_vl.checkpoint.hf_load import HFCheckpoint
from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.checkpoint.safetensors_file import DTYPE_NAMES, ShardReader, TensorSpec, forget
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.checkpoint.torch_dist import MANIFEST, matrix_shape
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.model import ModelConfig
from megatron_vl.errors import CheckpointError

# Small enough that the allocator uses the same memory again instead of asking for fresh pages.
BLOCK_BYTES = 16 << 20
# A checkpoint's tensor up to this size is read whole: its parts may cut every block.
WHOLE_BYTES = 512 << 20


@dataclass(frozen=True)
class Weight:
    """spec: name, dtype, shape. rows: (first, count) -> ``[count, columns]`` in that dtype. files: where it lies.

    held: bytes that a reading thread may hold besides the block itself.
    """

    spec: TensorSpec
    rows: Callable[[int, int], torch.Tensor]
    files: frozenset[str] = frozenset()
    held: int = 0

    def as_dtype(self, dtype: torch.dtype) -> Weight:
        """The same values, rounded to the nearest in another number format."""
        if dtype == self.spec.dtype:
            return self
        read = self.rows
        return replace(
            self, spec=replace(self.spec, dtype=dtype), rows=lambda first, count: read(first, count).to(dtype)
        )

    def blocks(self) -> list[tuple[int, int]]:
        """(first row, rows) of its blocks, see `row_blocks`."""
        return row_blocks(self.spec)

    def read(self) -> torch.Tensor:
        """The whole tensor in its released shape."""
        return self.rows(0, matrix_shape(self.spec.shape)[0]).reshape(self.spec.shape)


def row_blocks(spec: TensorSpec) -> list[tuple[int, int]]:
    """Cut a tensor into blocks of whole rows of at most 16 MiB (one row at least); a function of the spec alone."""
    rows, columns = matrix_shape(spec.shape)
    step = max(1, BLOCK_BYTES // (columns * spec.dtype.itemsize))
    return [(first, min(step, rows - first)) for first in range(0, rows, step)]


class Whole:
    """Rows of something that can only be made whole; it is dropped when every row was handed out once."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self._make, self._lock, self._matrix, self._served = make, threading.Lock(), None, 0

    def __call__(self, first: int, count: int) -> torch.Tensor:
        with self._lock:
            if self._matrix is None:
                whole = self._make()
                self._matrix = whole.reshape(matrix_shape(whole.shape))
                self._served = 0
            matrix = self._matrix
            self._served += count
            if self._served >= len(matrix):
                self._matrix = None
        return matrix[first : first + count]


class HFWeights:
    """A folder in the released layout whose tensors are exactly its config.json's model's.

    model: that other model, where the folder's config.json does not decide. check: False takes any tensors (parts).

    Raises:
        CheckpointError: listing every difference. ConfigErrors: config.json.
    """

    source_dtypes = None
    is_checkpoint = False

    def __init__(self, folder: Path, model: ModelConfig | None = None, check: bool = True) -> None:
        self.folder = folder
        checkpoint = HFCheckpoint(folder)
        self.model = model
        if check:
            self.model = model or model_from_hf(folder)
            checkpoint.check(self.model)
        files = checkpoint.files
        self.readers = {file: ShardReader(folder / file) for file in sorted(set(files.values()))}
        self.weights: dict[str, Weight] = {}
        for name in sorted(files):
            reader = self.readers[files[name]]
            if name not in reader.specs:
                raise CheckpointError(f"{reader.path}: has no tensor {name}, which the index puts there")
            self.weights[name] = Weight(
                reader.specs[name], partial(reader.read, name), frozenset([files[name]])
            )

    def close(self, file: str | None = None) -> None:
        """Close one file, or all."""
        for name in [file] if file else list(self.readers):
            self.readers[name].close()


class CheckpointWeights:
    """The model's weights in a checkpoint folder of the trainer, of any layout.

    Raises:
        CheckpointError: not a complete checkpoint, files missing or of a wrong size, tensors that are not the
            model's; every difference is listed.
    """

    is_checkpoint = True

    def __init__(self, folder: Path) -> None:
        self.stored = Stored(folder)
        self.folder, self.model = folder, self.stored.model
        # an import has stored digests of the tensors, which are compared while these pass by
        problems = self.stored.check_files(digests="tensor_digests" not in self.stored.state)
        if not problems:
            problems = stored_differences(self.stored)
        if problems:
            listed = "\n  ".join(problems)
            raise CheckpointError(f"{folder}: {len(problems)} problem(s):\n  {listed}")
        self._local = threading.local()
        self.source_dtypes: dict[str, str] | None = self.stored.state.get("source_dtypes")
        shapes = sorted(expected_tensors(self.model).items())
        self.weights = {name: self._weight(name, shape) for name, shape in shapes}

    def _weight(self, name: str, shape: tuple[int, ...], what: str = "model") -> Weight:
        key = f"{what}/{name}"
        tensor = self.stored.tensors[key]
        spec = TensorSpec(name, tensor.dtype, shape)
        files = frozenset(chunk.file for chunk in tensor.chunks)
        if len(tensor.chunks) > 1 and spec.nbytes <= WHOLE_BYTES:
            return Weight(spec, Whole(partial(self._read, key)), files, spec.nbytes)
        largest = max(chunk.size[0] * chunk.size[1] for chunk in tensor.chunks) * spec.dtype.itemsize
        return Weight(spec, partial(self._box, key), files, min(2, len(tensor.chunks)) * largest)

    def finest(self, name: str) -> Weight:
        """The weight in fp32 where a bf16 run keeps it so (its optimizer's main weights), else as it is stored."""
        main = self.stored.tensors.get(f"optimizer/main/{name}")
        weight = self.weights[name]
        if main is None or main.dtype.itemsize <= weight.spec.dtype.itemsize:
            return weight
        return self._weight(name, weight.spec.shape, "optimizer/main")

    def _read(self, key: str) -> torch.Tensor:
        whole = self._mine().read(key)
        for chunk in self.stored.tensors[key].chunks:
            forget(self.folder / chunk.file, chunk.start, chunk.length)
        self._forget()
        return whole

    def _box(self, key: str, first: int, count: int) -> torch.Tensor:
        rows, columns = self.stored.tensors[key].shape
        values = self._mine().read_box(key, (first, 0), (count, columns))
        for chunk in self.stored.tensors[key].chunks:
            if chunk.offset[0] + chunk.size[0] <= first + count and chunk.offset[0] + chunk.size[0] > first:
                forget(self.folder / chunk.file, chunk.start, chunk.length)  # its last row was read
        if first + count >= rows:
            self._forget()
        return values

    def _mine(self) -> Stored:
        """This thread's view: `Stored` keeps the last chunk that it read, which threads must not share."""
        if not hasattr(self._local, "stored"):
            self._local.stored = copy.copy(self.stored)
        return self._local.stored

    def _forget(self) -> None:
        """Drop this thread's view, and with it the chunk that it keeps: one may have 2.5 GB."""
        del self._local.stored

    def close(self, file: str | None = None) -> None:
        """Nothing stays open between reads."""


def stored_differences(stored: Stored) -> list[str]:
    """Every way in which a checkpoint's weights are not its model's, sorted."""
    expected = {name: matrix_shape(shape) for name, shape in expected_tensors(stored.model).items()}
    names = set(stored.weight_names)
    found = [f"missing: {name}" for name in expected if name not in names]
    found += [f"unexpected: {name}" for name in names if name not in expected]
    for name in names & expected.keys():
        tensor = stored.tensors[f"model/{name}"]
        if tensor.shape != expected[name]:
            found.append(f"shape: {name} is stored as {tensor.shape}, the model wants {expected[name]}")
        if tensor.dtype not in DTYPE_NAMES:
            found.append(
                f"dtype: {name} is {tensor.dtype}, expected one of {', '.join(DTYPE_NAMES.values())}"
            )
    return sorted(found)


def open_weights(path: Path) -> HFWeights | CheckpointWeights:
    """A Hugging Face folder, a checkpoint folder, or a folder of checkpoints (then its newest).

    Raises:
        CheckpointError: neither.
    """
    try:
        checkpoint = find(path)
    except CheckpointError as error:
        if any(path.glob("model*.safetensors*")):
            return HFWeights(path)
        raise CheckpointError(
            f"{path}: neither a checkpoint (no {MANIFEST}, no step_* folder) nor a Hugging Face folder "
            "(no model*.safetensors); give one of the two"
        ) from error
    return CheckpointWeights(checkpoint)


def total_bytes(weights: Sequence[Weight]) -> int:
    """Bytes of all values."""
    return sum(weight.spec.nbytes for weight in weights)
