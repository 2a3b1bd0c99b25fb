"""Read a checkpoint folder: its index, its state, any rectangle of any tensor. Nothing from a file is executed."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.checkpoint.torch_dist import CONFIG, INDEX, MANIFEST, STATE, Pair, matrix_shape
from megatron_vl.config.load import load_run
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError, ConfigError

FORMAT = 1
# What torch's index may name when it is unpickled; everything else is refused.
ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
} | {
    ("torch", name)
    for name in (
        "float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16",
        "int8", "uint8", "bool",
    )
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no index of a checkpoint needs")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Chunk:
    """A stored rectangle and where its bytes lie."""

    offset: Pair
    size: Pair
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A stored matrix and its rectangles."""

    shape: Pair
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class Stored:
    """A complete checkpoint folder.

    Raises:
        CheckpointError: a file that every checkpoint has is missing or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{self.folder}: no {MANIFEST}: not a checkpoint, or one whose saving was interrupted; name a "
                "step_* folder of a run's checkpoints"
            )
        self.state: dict[str, Any] = self._json(STATE)
        if self.state.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.folder / STATE}: format {self.state.get('format')!r}; this version reads format {FORMAT}"
            )
        self.tensors = self._read_index()
        self._last: tuple[Chunk, torch.Tensor] | None = None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise damaged(self.folder / name, error) from error
        if not isinstance(content, dict):
            raise damaged(self.folder / name, "not a JSON object")
        return content

    def _read_index(self) -> dict[str, StoredTensor]:
        path = self.folder / INDEX
        try:
            with path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            chunks: dict[str, list[Chunk]] = {key: [] for key in metadata.state_dict_metadata}
            sizes = {
                (key, tuple(c.offsets)): tuple(c.sizes)
                for key, tensor in metadata.state_dict_metadata.items()
                for c in tensor.chunks
            }
            for where, info in metadata.storage_data.items():
                if Path(info.relative_path).name != info.relative_path:
                    raise ValueError(f"names the file {info.relative_path!r} outside of the folder")
                offset = tuple(where.offset)
                place = (info.relative_path, info.offset, info.length)
                chunks[where.fqn].append(Chunk(offset, sizes[where.fqn, offset], *place))
            return {
                key: StoredTensor(tuple(tensor.size), tensor.properties.dtype, tuple(chunks[key]))
                for key, tensor in metadata.state_dict_metadata.items()
            }
        except CheckpointError:
            raise
        except Exception as error:  # unpickling damaged bytes raises anything
            raise damaged(path, error) from error

    @cached_property
    def config(self) -> RunConfig:
        """The resolved configuration that was saved with the weights.

        Raises:
            CheckpointError: written by a version of the package with other keys, or damaged.
        """
        try:
            return load_run(str(self.folder / CONFIG)).config
        except ConfigError as error:
            raise CheckpointError(
                f"{self.folder / CONFIG} is no configuration of this version: {error}"
            ) from error

    @property
    def model(self) -> ModelConfig:
        """The model of that configuration."""
        return self.config.model

    @property
    def weight_names(self) -> list[str]:
        """Released names of the stored weights."""
        return [key.removeprefix("model/") for key in self.tensors if key.startswith("model/")]

    def weight(self, name: str) -> torch.Tensor:
        """One whole weight in its released shape and stored dtype.

        Raises:
            CheckpointError: it is not stored, has another size than the model's, or its file is damaged.
        """
        shape = expected_tensors(self.model)[name]
        key = f"model/{name}"
        if key not in self.tensors or self.tensors[key].shape != matrix_shape(shape):
            found = self.tensors[key].shape if key in self.tensors else "not there"
            raise CheckpointError(f"{self.folder}: {name} is {found}, the model wants {list(shape)}")
        return self.read(key).reshape(shape)

    def read(self, key: str) -> torch.Tensor:
        """A whole stored matrix."""
        return self.read_box(key, (0, 0), self.tensors[key].shape)

    def read_box(self, key: str, offset: Pair, size: Pair) -> torch.Tensor:
        """A rectangle of a stored matrix, put together from the chunks that it meets.

        Raises:
            CheckpointError: a chunk is missing or damaged.
        """
        tensor = self.tensors[key]
        result = torch.empty(size, dtype=tensor.dtype)
        covered = 0
        for chunk in tensor.chunks:
            low = [max(a, b) for a, b in zip(offset, chunk.offset)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, chunk.offset, chunk.size)]
            if low[0] >= high[0] or low[1] >= high[1]:
                continue
            values = self._chunk(key, chunk, tensor.dtype)
            there = [slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offset)]
            here = [slice(a - o, b - o) for a, b, o in zip(low, high, offset)]
            part = values[there[0], there[1]]
            if part.shape == result.shape:
                return part  # the usual case: nothing to put together
            result[here[0], here[1]] = part
            covered += part.numel()
        if covered != result.numel():
            raise damaged(
                self.folder / INDEX, f"{key}: {covered} of {result.numel()} values at {offset} are there"
            )
        return result

    def _chunk(self, key: str, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        """The values of one chunk; the last one is kept, since neighbours are often read after each other."""
        last = self._last  # read once: other threads may replace it
        if last is not None and last[0] == chunk:
            return last[1]
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                values = torch.load(_view(file, chunk), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive raises anything
            raise damaged(path, error) from error
        if not isinstance(values, torch.Tensor) or (tuple(values.shape), values.dtype) != (chunk.size, dtype):
            raise damaged(path, f"{key}: another tensor than the index says")
        self._last = (chunk, values)
        return values

    def forget(self) -> None:
        """Give up the chunk that was kept for a next reader."""
        self._last = None

    def check_files(self, digests: bool = True, share: Pair = (0, 1)) -> list[str]:
        """Problems of the files against the manifest: missing, wrong size, wrong sha256 (only with ``digests``).

        share: (k, n) checks every n-th file from the k-th on, so that ranks can divide the work.
        """
        return check_files(self.folder, digests, share)


def check_files(folder: Path, digests: bool = True, share: Pair = (0, 1)) -> list[str]:
    """As `Stored.check_files`, also for a folder that cannot be opened."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST} cannot be read ({error})"]
    problems = []
    for name, size, digest in sorted(listed, key=lambda f: -f[1])[share[0] :: share[1]]:
        if Path(name).name != name:
            problems.append(f"{folder / MANIFEST} names {name!r} outside of the folder")
            continue
        try:
            problem = _file_problem(folder / name, size, digest if digests else None)
        except OSError as error:  # a bad sector, a lost mount, no permission
            problem = f"{folder / name} cannot be read ({error})"
        problems += [problem] if problem else []
    return problems


def _file_problem(path: Path, size: int, digest: str | None) -> str:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, the manifest says {size}"
    if digest is not None and _sha256(path) != digest:
        return f"{path} is damaged: its sha256 is not the manifest's"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _view(file: BinaryIO, chunk: Chunk) -> io.IOBase:
    return _create_file_view(file, chunk.start, chunk.length)


def damaged(path: Path, why: object) -> CheckpointError:
    """The error for a file that is not what it should be."""
    return CheckpointError(
        f"{path} cannot be read: {why}; the checkpoint is damaged: remove its folder, and the one before it is used"
    )
