"""Read a checkpoint directory in the released layout into any layout, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_vl.checkpoint.hf_names import expected_tensors, global_name, rules_by_name, shard, to_ours
from megatron_vl.config.model import ModelConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.plan.stages import Stage

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16", "F64")


class HFCheckpoint:
    """Lazy reader of ``model-*.safetensors`` through their index (or of one ``model.safetensors``).

    Raises:
        CheckpointError: no index, a shard missing, damaged or outside the directory, an index that disagrees.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.files = self._read_index()
        self._open: dict[str, safe_open] = {}

    def _read_index(self) -> dict[str, str]:
        index, single = self.directory / INDEX, self.directory / "model.safetensors"
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory; give one that holds {INDEX}")
        if not index.is_file():
            if not single.is_file():
                raise CheckpointError(f"{self.directory}: neither {INDEX} nor model.safetensors is there")
            with self._safe_open(single.name) as file:
                return dict.fromkeys(file.keys(), single.name)
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{index}: not a safetensors index with a weight_map ({error})") from error
        if not isinstance(files, dict):
            raise CheckpointError(f"{index}: weight_map must be an object of tensor names and shards")
        bad = sorted({str(f) for f in files.values() if not isinstance(f, str) or Path(f).name != f})
        if bad:
            raise CheckpointError(f"{index}: shards {bad} must be plain file names inside the directory")
        missing = sorted({f for f in files.values() if not (self.directory / f).is_file()})
        if missing:
            raise CheckpointError(f"{self.directory}: shard(s) {missing} named by {INDEX} are missing")
        return files

    def _safe_open(self, name: str) -> safe_open:
        try:
            return safe_open(self.directory / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.directory / name}: not a readable safetensors file ({error})"
            ) from error

    def _shard(self, name: str) -> safe_open:
        if name not in self._open:
            self._open[name] = self._safe_open(name)
        return self._open[name]

    def shape_and_dtype(self, tensor: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype name, without reading the data."""
        try:
            part = self._shard(self.files[tensor]).get_slice(tensor)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.directory / self.files[tensor]}: has no tensor {tensor}: {error}"
            ) from error
        return tuple(part.get_shape()), part.get_dtype()

    def tensor(self, name: str) -> torch.Tensor:
        """One whole tensor in its stored dtype, on CPU."""
        return self._shard(self.files[name]).get_tensor(name)

    def differences(self, model: ModelConfig) -> list[str]:
        """Every way in which the tensors are not the model's, sorted; shards and index are compared too.

        Raises:
            CheckpointError: a shard that cannot be read.
        """
        expected = expected_tensors(model)
        problems = [
            f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in self.files
        ]
        problems += [f"unexpected: {name}" for name in self.files if name not in expected]
        stored = {file: set(self._shard(file).keys()) for file in sorted(set(self.files.values()))}
        for file, names in stored.items():
            extra = sorted(name for name in names if self.files.get(name) != file)
            problems += [f"not in the index: {name} in {file}" for name in extra]
        for name, file in self.files.items():
            if name not in stored[file]:
                problems.append(f"not in its shard: {name}, which {INDEX} puts in {file}")
            elif name in expected:
                problems += self._shape_and_dtype_problems(name, expected[name])
        return sorted(problems)

    def _shape_and_dtype_problems(self, name: str, expected: tuple[int, ...]) -> list[str]:
        shape, dtype = self.shape_and_dtype(name)
        problems = []
        if shape != expected:
            problems.append(f"shape: {name} is {list(shape)}, the model wants {list(expected)}")
        if dtype not in FLOATS:
            problems.append(f"dtype: {name} is {dtype}, expected one of {', '.join(FLOATS)}")
        return problems

    def check(self, model: ModelConfig) -> None:
        """Refuse a checkpoint that is not exactly the model's.

        Raises:
            CheckpointError: listing all `differences`.
        """
        problems = self.differences(model)
        if problems:
            listed = "\n  ".join(problems)
            raise CheckpointError(
                f"{self.directory}: {len(problems)} tensor(s) do not fit the model:\n  {listed}"
            )


def load_weights(
    chunks: Iterable[torch.nn.Module],
    stages: Iterable[Stage],
    model: ModelConfig,
    source: Callable[[str], torch.Tensor] | None,
    tp: tuple[int, int],
    vision_tp: tuple[int, int],
) -> None:
    """Fill the parameters of this rank's chunks from released tensors, and mark how they are sharded.

    source: released name -> whole tensor; None leaves the values as they are, for a checkpoint that fills them
    later. tp, vision_tp: (size, rank) of the sharding of decoder and tower.

    Raises:
        CheckpointError: a parameter that no rule names, or one whose shape does not come out.
    """
    rules = rules_by_name(model)
    for chunk, stage in zip(chunks, stages):
        for local, parameter in chunk.named_parameters():
            name = global_name(local, stage.layers)
            if name not in rules:
                raise CheckpointError(f"parameter {name} stands in no rule of checkpoint/hf_names.py")
            rule = rules[name]
            size, rank = tp if rule.part == "decoder" else vision_tp
            if source is not None:
                whole = to_ours(rule, [source(hf) for hf, _ in rule.hf], model)
                _fill(name, parameter, shard(rule, whole, size, rank))
            # Megatron-Core sets these when it draws the weights itself; the global gradient norm reads them
            # and would count a shard without the mark on tensor-parallel rank 0 only
            parameter.tensor_model_parallel = rule.axis is not None and size > 1
            parameter.partition_dim = -1 if rule.axis is None else rule.axis
            parameter.partition_stride = 1


def _fill(name: str, parameter: torch.nn.Parameter, part: torch.Tensor) -> None:
    if part.shape != parameter.shape:
        raise CheckpointError(f"{name}: shard {list(part.shape)} for a parameter {list(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(part)
