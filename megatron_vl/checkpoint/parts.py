"""The weights of a new run put together: a Qwen3 text checkpoint, a PE-lang vision checkpoint, the rest drawn fresh.

Names. Text: `Qwen3ForCausalLM` (``model.*``, ``lm_head.weight``), which are the released ones. Vision:
facebookresearch/perception_models (``conv1.weight``, ``transformer.resblocks.0.attn.in_proj_weight``, ...), the
released ones without ``vision_model.``; its files are state dictionaries, perhaps under ``state_dict`` or ``weights``
and with ``module.`` or ``visual.`` before each name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_vl.checkpoint.hf_names import VISION, all_rules, expected_tensors
from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES, ShardReader, TensorSpec
from megatron_vl.checkpoint.torch_dist import matrix_shape
from megatron_vl.checkpoint.weights import HFWeights, Weight, Whole
from megatron_vl.config.hf_config import model_from_hf, read_json_object
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.same_model import model_differences
from megatron_vl.errors import CheckpointError, Problem, raise_if_any

EMBEDDING, HEAD, POSITIONS = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "vision_model.positional_embedding",
)
# What a vision checkpoint may hold that PE-lang does not use: the pooling head and the output projection.
UNUSED = ("attn_pool.", "proj")
PICKLED = (".pt", ".pth", ".bin")


@dataclass
class Parts:
    """weights: the model's, complete. origins: part -> (tensors, where from). notes: worth telling."""

    weights: dict[str, Weight]
    origins: list[tuple[str, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def assemble(
    model: ModelConfig,
    text: Path | None,
    vision: Path | None,
    seed: int,
    resize_positions: bool = False,
) -> Parts:
    """Text and vision weights in their own formats, what neither has drawn by `FreshWeights` from ``seed``.

    Fresh tensors take the format of most of the others. Either part may be left out, not both.

    Raises:
        CheckpointError: every tensor of a source that is missing, unknown or misshapen.
        ConfigErrors: the text checkpoint's config.json describes another decoder.
    """
    if text is None and vision is None:
        raise CheckpointError(
            "neither --text nor --vision: give at least one part; train.seed alone draws all of it"
        )
    notes: list[str] = []
    found: dict[str, Weight] = {}
    rows: list[tuple[str, int, str]] = []
    for part, folder, read in (("text", text, _text), ("vision", vision, _vision)):
        if folder is None:
            continue
        weights = read(folder, model, notes, resize_positions)
        found |= weights
        rows.append((part, len(weights), str(folder)))
    expected = expected_tensors(model)
    dtype = Counter(weight.spec.dtype for weight in found.values()).most_common(1)[0][0]
    fresh = FreshWeights(model, seed)
    drawn: Counter = Counter()
    for name, shape in expected.items():
        if name not in found:
            found[name] = _fresh(fresh, name, shape).as_dtype(dtype)
            drawn[part_of(name)] += 1
    rows += [(part, count, f"drawn, seed {seed}, {DTYPE_NAMES[dtype]}") for part, count in drawn.items()]
    return Parts({name: found[name] for name in sorted(found)}, rows, notes)


def part_of(name: str) -> str:
    """The part of the model that a released tensor belongs to, downsamplers by themselves."""
    if name.startswith("vision_model."):
        return "downsamplers" if ".vit_downsampler" in name else "vision"
    return "projector" if name.startswith("vit_large_projector") else "text"


def _fresh(draw: FreshWeights, name: str, shape: tuple[int, ...]) -> Weight:
    spec = TensorSpec(name, torch.float32, shape)
    return Weight(spec, Whole(lambda: draw(name)), held=2 * spec.nbytes)


def _text(folder: Path, model: ModelConfig, notes: list[str], _: bool) -> dict[str, Weight]:
    """The decoder's weights; the head of a tied checkpoint is a copy of its embedding."""
    config = read_json_object(folder / "config.json", required=True)
    _check_text_config(config, model, folder)
    given = dict(HFWeights(folder, check=False).weights)
    if config.get("tie_word_embeddings"):
        if given.pop(HEAD, None) is not None:
            notes.append(f"text: {HEAD} is not used: config.json ties it to {EMBEDDING}")
        if EMBEDDING in given:
            given[HEAD] = replace(given[EMBEDDING], spec=replace(given[EMBEDDING].spec, name=HEAD))
            notes.append(
                f"text: tied embeddings: {HEAD} begins as a copy of {EMBEDDING}; this model trains the two apart"
            )
    wanted = {name: shape for name, shape in expected_tensors(model).items() if part_of(name) == "text"}
    _check(folder, given, wanted)
    return given


def _check_text_config(config: Mapping[str, Any], model: ModelConfig, folder: Path) -> None:
    """The decoder that a Qwen3 config.json describes must be the model's.

    Raises:
        ConfigErrors: every field that differs, or asks for what is not implemented.
    """
    section = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    theirs = model_from_hf({"text_config": section})
    where = f"{folder}/config.json"
    raise_if_any(
        Problem(
            f"model.{path}", ours, f"{where} says {other}", f"set model.{path}={other}, or another --text"
        )
        for path, ours, other in model_differences(theirs, model, ("text",))
    )


def _vision(path: Path, model: ModelConfig, notes: list[str], resize: bool) -> dict[str, Weight]:
    """The tower's weights, without the downsamplers, which no PE checkpoint has."""
    given = {}
    for name, weight in _vision_source(path).items():
        if name.startswith(UNUSED[0]) or name == UNUSED[1]:
            notes.append(f"vision: {name} is not used: PE-lang has no pooling and no output projection")
            continue
        released = f"vision_model.{name}"
        given[released] = replace(weight, spec=replace(weight.spec, name=released))
    wanted = {
        name: shape
        for rule in all_rules(model)
        if rule.part == VISION
        for name, shape in rule.hf
        if part_of(name) == "vision"
    }
    _fit_positions(path, given, wanted, notes, resize)
    _check(path, given, wanted)
    notes.append(
        "vision: the original Perception Encoder computes GELU, this model quick-GELU, as the release does: features "
        "differ slightly until the tower is trained (number of heads and activation are not in a PE file)"
    )
    return given


def _fit_positions(
    path: Path,
    given: dict[str, Weight],
    wanted: Mapping[str, tuple[int, ...]],
    notes: list[str],
    resize: bool,
) -> None:
    """Another resolution's position table: resized when asked to, as for crops (spec/model.md section 2).

    Raises:
        CheckpointError: a class token's row, a table that is no square, or a resize that was not asked for.
    """
    weight = given.get(POSITIONS)
    if weight is None or weight.spec.shape == wanted[POSITIONS]:
        return
    have, want = weight.spec.shape, wanted[POSITIONS]
    side, target = math.isqrt(have[0]), math.isqrt(want[0])
    if len(have) != 2 or have[1] != want[1]:
        return  # another width: listed with everything else
    if math.isqrt(have[0] - 1) ** 2 == have[0] - 1 and "vision_model.class_embedding" in given:
        raise CheckpointError(
            f"{path}: the position table has {have[0]} rows, one for a class token, which this model does not have; "
            "use a PE-lang checkpoint without class token (PE-Lang-G14-448)"
        )
    if side**2 != have[0]:
        raise CheckpointError(
            f"{path}: a position table of {have[0]} rows is no square grid; use another file"
        )
    if not resize:
        raise CheckpointError(
            f"{path}: the position table is for a grid of {side} x {side} patches, the model's is {target} x "
            f"{target}; give --resize-positions to resize it (bilinear, as crops are), or set model.vision.image_size"
        )
    given[POSITIONS] = Weight(
        replace(weight.spec, shape=want), Whole(lambda: resized(weight.read(), target)), weight.files
    )
    notes.append(f"vision: position table resized bilinearly from {side} x {side} to {target} x {target}")


def resized(table: torch.Tensor, side: int) -> torch.Tensor:
    """A position table ``[n * n, width]`` for a grid of ``side * side``: bilinear, align_corners=False, in fp32."""
    grid = math.isqrt(len(table))
    image = table.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    made = torch.nn.functional.interpolate(image, size=(side, side), mode="bilinear", align_corners=False)
    return made.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)


def _vision_source(path: Path) -> dict[str, Weight]:
    """Tensors of a file or folder under their names in facebookresearch/perception_models.

    Raises:
        CheckpointError: nothing that can be read is there.
    """
    if path.is_dir() and not any(path.glob("model*.safetensors*")):
        files = [p for p in sorted(path.iterdir()) if p.suffix in (*PICKLED, ".safetensors")]
        if len(files) != 1:
            listed = ", ".join(p.name for p in files) or "none"
            raise CheckpointError(f"{path}: give the vision checkpoint's file itself (found here: {listed})")
        path = files[0]
    if path.is_dir():
        given = HFWeights(path, check=False).weights
    elif path.suffix == ".safetensors":
        reader = ShardReader(path)
        given = {name: Weight(spec, partial(reader.read, name)) for name, spec in reader.specs.items()}
    elif path.suffix in PICKLED and path.is_file():
        given = _pickled(path)
    else:
        raise CheckpointError(f"{path}: not a folder, .safetensors, .pt, .pth or .bin file that is there")
    return _without_prefixes(given)


def _pickled(path: Path) -> dict[str, Weight]:
    """A state dictionary as `torch.save` writes it, mapped from the file; nothing in it is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling damaged bytes raises anything
        raise CheckpointError(f"{path}: cannot be read as a state dictionary ({error})") from error
    for key in ("state_dict", "weights"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise CheckpointError(f"{path}: holds no state dictionary (name -> tensor)")
    bad = [f"{name} is {t.dtype}" for name, t in content.items() if t.dtype not in DTYPE_NAMES]
    if bad:
        raise CheckpointError(f"{path}: {'; '.join(bad)}: expected one of {', '.join(DTYPES)}")
    return {
        name: Weight(TensorSpec(name, t.dtype, tuple(t.shape)), _slicing(t.detach()))
        for name, t in content.items()
    }


def _slicing(tensor: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    matrix = tensor.reshape(matrix_shape(tensor.shape))
    return lambda first, count: matrix[first : first + count]


def _without_prefixes(given: Mapping[str, Weight]) -> dict[str, Weight]:
    """``module.`` and ``visual.`` taken off; of a file with ``visual.`` only those (the rest is its text tower)."""
    plain = {name.removeprefix("module."): weight for name, weight in given.items()}
    if any(name.startswith("visual.") for name in plain):
        plain = {n.removeprefix("visual."): w for n, w in plain.items() if n.startswith("visual.")}
    return {name.removeprefix("vision_model."): weight for name, weight in plain.items()}


def _check(path: Path, given: Mapping[str, Weight], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Every source tensor must be used, every wanted one be there, in its shape.

    Raises:
        CheckpointError: listing all that is not so.
    """
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in given]
    problems += [f"unexpected: {name}" for name in given if name not in wanted]
    problems += [
        f"shape: {name} is {list(weight.spec.shape)}, the model wants {list(wanted[name])}"
        for name, weight in given.items()
        if name in wanted and weight.spec.shape != wanted[name]
    ]
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise CheckpointError(f"{path}: {len(problems)} tensor(s) do not fit the model:\n  {listed}")
