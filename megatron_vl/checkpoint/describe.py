"""What is in a checkpoint or Hugging Face folder, as plain data and as lines of text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_vl.checkpoint.meter import table
from megatron_vl.checkpoint.parts import part_of
from megatron_vl.checkpoint.safetensors_file import DTYPE_NAMES
from megatron_vl.checkpoint.weights import CheckpointWeights, HFWeights
from megatron_vl.plan.layout import Layout

PARTS = ("vision", "downsamplers", "projector", "text")


def describe(source: CheckpointWeights | HFWeights) -> dict[str, Any]:
    """Tensors, parameters by part, number formats, files; of a checkpoint also layout and progress."""
    parts: dict[str, dict[str, int]] = {name: {"tensors": 0, "parameters": 0, "bytes": 0} for name in PARTS}
    dtypes: Counter = Counter()
    for name, weight in source.weights.items():
        spec = weight.spec
        entry = parts[part_of(name)]
        entry["tensors"] += 1
        entry["parameters"] += spec.nbytes // spec.dtype.itemsize
        entry["bytes"] += spec.nbytes
        dtypes[DTYPE_NAMES[spec.dtype]] += 1
    total = {key: sum(entry[key] for entry in parts.values()) for key in ("tensors", "parameters", "bytes")}
    return {
        "folder": str(source.folder),
        "kind": "checkpoint" if isinstance(source, CheckpointWeights) else "Hugging Face",
        "parts": parts,
        "total": total,
        "dtypes": dict(dtypes),
        "files": _files(source.folder),
        **(_state(source) if isinstance(source, CheckpointWeights) else {}),
    }


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def _state(source: CheckpointWeights) -> dict[str, Any]:
    """What only a checkpoint has. optimizer: what -> tensors."""
    state, keys = source.stored.state, source.stored.tensors
    optimizer = Counter(key.split("/")[1] for key in keys if key.startswith("optimizer/"))
    steps = set(state.get("optimizer_steps", {}).values())
    layout = state.get("layout")
    recorded = Counter((source.source_dtypes or {}).values())
    return {
        "progress": state["progress"],
        "layout": str(Layout(**layout)) if layout else None,
        "origin": state.get("origin"),
        "optimizer": dict(optimizer),
        "optimizer_steps": sorted(steps),
        "source_dtypes": dict(recorded) or None,
        "has_digests": "tensor_digests" in state,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """`describe` for people."""
    rows = [("part", "tensors", "parameters", "GB")]
    for name, entry in [*found["parts"].items(), ("total", found["total"])]:
        rows.append(
            (name, f"{entry['tensors']:,}", f"{entry['parameters']:,}", f"{entry['bytes'] / 1e9:.3f}")
        )
    listed = ", ".join(f"{count} {name}" for name, count in found["dtypes"].items())
    text = [f"{found['kind']} {found['folder']}", "", table(rows), "", f"number formats  {listed}"]
    if found["kind"] == "checkpoint":
        progress = found["progress"]
        told = ", ".join(f"{key} {value}" for key, value in progress.items() if key != "data")
        text.append(f"progress        {told}")
        text.append(f"saved from      {found['layout'] or found['origin'] or 'unknown'}")
        optimizer = ", ".join(f"{name} {count}" for name, count in found["optimizer"].items()) or "none"
        steps = ", ".join(map(str, found["optimizer_steps"])) or "none"
        text.append(f"optimizer       {optimizer}; steps {steps}")
        kept = ", ".join(f"{count} {name}" for name, count in (found["source_dtypes"] or {}).items())
        text.append(f"source formats  {kept or 'not recorded'}")
    sizes = list(found["files"].values())
    text.append(f"files           {len(sizes)}, {sum(sizes) / 1e9:.3f} GB")
    text += [f"  {size:>16,}  {name}" for name, size in found["files"].items()]
    return text
