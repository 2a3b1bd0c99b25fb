"""Folders to convert: released ones of several kinds, and a checkpoint as training leaves it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_vl.checkpoint.convert import Options
from megatron_vl.checkpoint.hf_load import HFCheckpoint
from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.checkpoint.stored import FORMAT
from megatron_vl.checkpoint.torch_dist import Item, matrix_shape, publish, write
from megatron_vl.config.dump import to_yaml
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RunConfig
from megatron_vl.plan.layout import Layout
from tests.fixtures.paths import TINY_A

QUIET = Options(quiet=True)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a Hugging Face folder, read by the safetensors library through the index."""
    checkpoint = HFCheckpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.files}


def copy_of_tiny_a(folder: Path) -> Path:
    shutil.copytree(TINY_A, folder, ignore=shutil.ignore_patterns("reference.safetensors"))
    return folder


def mixed(folder: Path) -> Path:
    """tiny_a with tensors of three number formats."""
    copy_of_tiny_a(folder)
    formats = (torch.float32, torch.bfloat16, torch.float16)
    for path in folder.glob("model-*.safetensors"):
        tensors = load_file(path)
        save_file({n: t.to(formats[i % 3]) for i, (n, t) in enumerate(sorted(tensors.items()))}, path)
    return folder


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Names, shapes, formats and bits."""
    assert sorted(left) == sorted(right)
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name


def trained(
    folder: Path,
    weights: dict[str, torch.Tensor],
    model: ModelConfig,
    source_dtypes: dict[str, str] | None,
    main: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A checkpoint as training leaves it: matrices in pieces that cut rows and columns, written by two ranks.

    main: fp32 main weights, which make it one with optimizer state.
    """
    aside = folder.with_name(folder.name + ".tmp")
    aside.mkdir(parents=True)
    items = [item for name, tensor in weights.items() for item in _pieces(f"model/{name}", tensor)]
    for name, tensor in (main or {}).items():
        items += _pieces(f"optimizer/main/{name}", tensor)
    written = [write(aside, items[rank::2], prefix=f"__{rank}_") for rank in range(2)]
    state = {
        "format": FORMAT,
        "progress": asdict(Progress(7, 700, samples=56)),
        "layout": asdict(Layout(tp=2)),
        "optimizer_steps": dict.fromkeys(main or {}, 7),
        "source_dtypes": source_dtypes,
    }
    publish(aside, folder, written, state, to_yaml(RunConfig(model=model)))
    return folder


def _pieces(key: str, tensor: torch.Tensor) -> list[Item]:
    """Up to four rectangles."""
    rows, columns = shape = matrix_shape(tensor.shape)
    matrix = tensor.reshape(shape)
    cuts = [sorted({0, size // 3, size}) for size in shape]
    items = []
    for top, bottom in zip(cuts[0], cuts[0][1:]):
        for left, right in zip(cuts[1], cuts[1][1:]):
            part = matrix[top:bottom, left:right]
            offset, size = (top, left), (bottom - top, right - left)
            items.append(Item(key, shape, tensor.dtype, offset, size, partial(torch.clone, part)))
    return items


def trained_tiny(folder: Path, dtype: torch.dtype, source: str | None, with_main: bool = False) -> tuple:
    """(checkpoint, its stored weights, its fp32 weights) of tiny_a's model with weights of its own."""
    model = model_from_hf(TINY_A)
    shapes = expected_tensors(model)
    generator = torch.Generator().manual_seed(3)
    fine = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    stored = {name: tensor.to(dtype) for name, tensor in fine.items()}
    dtypes = dict.fromkeys(shapes, source) if source else None
    return trained(folder, stored, model, dtypes, fine if with_main else None), stored, fine


def edit_state(checkpoint: Path, **changes: object) -> None:
    """Change keys of state.json in place, keeping the manifest true."""
    path, manifest = checkpoint / "state.json", checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    listed = json.loads(manifest.read_text())
    listed["files"]["state.json"]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(listed))
