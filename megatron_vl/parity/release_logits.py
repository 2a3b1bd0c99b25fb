"""Logits of this model against those of a release's own remote code, on the same images and text.

NEVER RUN ON THE REAL RELEASE: its 20 GB were not at hand when this was written. What ran is this driver with
a stand-in for the release (tests/tools/test_verify_release.py). What it takes for granted of the release's
code is the README's example (spec/model.md 6.3): AutoProcessor and AutoModelForCausalLM load from the
directory, the processor expands one `<im_patch>` per image, and its output is what the model's forward takes.

The two models are in memory one after the other. transformers is no dependency of this package.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from megatron_vl.checkpoint.hf_load import HFCheckpoint
from megatron_vl.checkpoint.release import SKIPPED, Check, Expected
from megatron_vl.config.hf_config import read_json_object
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig, ParallelConfig, PrecisionConfig, RunConfig
from megatron_vl.data.batch import MicroBatch, collate
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.rows import RowBuilder
from megatron_vl.errors import CheckpointError, DataError, MegatronVLError
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parallel.world import LocalWorld, RankFailed
from megatron_vl.train.build import build
from megatron_vl.train.step import stage_inputs

NAME = "logits"
# Without these rules transformers leaves the decoder random and only warns (README of the release).
KEY_MAPPING = {
    "^vision_model": "model.vision_model",
    r"^model(?!\.(language_model|vision_model))": "model.language_model",
    "vit_large_projector": "model.vit_large_projector",
}
QUESTION, ANSWER = "What is in this picture?", "A few shapes on a coloured ground."
PROMPT = f"<|im_start|>user\n<im_patch>{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
# dtype: (largest relative L2 of the logits, smallest share of positions with the same best token). The tiny
# golden model is within 7e-7 and 1.6e-2; this one is ten times as deep.
BOUNDS = {"fp32": (1e-3, 0.999), "bf16": (5e-2, 0.98)}
MAX_PIXEL_DIFFERENCE = 2e-3
HOURS = 3600.0


@dataclass(frozen=True)
class Options:
    """images:

    files, () = five are drawn. trust_remote_code: the user agrees to run the directory's Python.
    """

    images: tuple[Path, ...] = ()
    trust_remote_code: bool = False
    dtype: str = "bf16"
    device: str = "cpu"
    tokenizer: Path | None = None


class Release(Protocol):
    """The release's own code: `RemoteRelease`, or a stand-in in tests."""

    def inputs(self, text: str, image: Path) -> dict[str, Any]:
        """What the release's processor makes: `input_ids` [1, S], `pixel_values`, and so on."""

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """[S, vocabulary], on CPU."""


class RemoteRelease:
    """Loads the directory's remote code with transformers. EXECUTES THE PYTHON FILES OF THE DIRECTORY.

    Raises:
        CheckpointError: the weights did not all find their place.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: str) -> None:
        from transformers import AutoModelForCausalLM, AutoProcessor

        here: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
        self.processor = AutoProcessor.from_pretrained(directory, **here)
        self.model, found = AutoModelForCausalLM.from_pretrained(
            directory, key_mapping=KEY_MAPPING, dtype=dtype, output_loading_info=True, **here
        )
        bad = {kind: sorted(map(str, names)) for kind, names in found.items() if names and "keys" in kind}
        if bad:
            raise CheckpointError(
                f"the release's own code did not take all weights: {json.dumps(bad)[:2000]}"
            )
        self.model.to(device).eval()

    def inputs(self, text: str, image: Path) -> dict[str, Any]:
        with Image.open(image) as picture:
            picture.load()
            return dict(self.processor(text=[text], images=[picture], return_tensors="pt"))

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        return self.model(**moved).logits[0].cpu()


def check_logits(
    directory: Path,
    expected: Expected,
    options: Options,
    load: Callable[[Path, torch.dtype, str], Release] = RemoteRelease,
) -> Check:
    """Both models on each image. load: how the release is loaded; tests put a stand-in there."""
    reason = refusal(directory, options, needs_transformers=load is RemoteRelease)
    if reason:
        return Check(NAME, SKIPPED, reason)
    tokenizer = options.tokenizer or directory / "tokenizer.json"
    with tempfile.TemporaryDirectory() as folder:
        images = options.images or draw_images(Path(folder), expected.model)
        notes = [f"runs {name}, SHA-256 {digest}" for name, digest in remote_code(directory)]
        try:
            batches = [our_inputs(image, expected.model, tokenizer) for image in images]
            differences = _run_release(directory, images, batches, options, Path(folder), load)
            jobs = [(batch, Path(folder, f"{n}.safetensors")) for n, batch in enumerate(batches)]
            jobs = [(batch, file) for batch, file in jobs if file.is_file()]
            results = _run_ours(directory, expected.model, jobs, options)
        except (MegatronVLError, RankFailed) as error:
            return Check.of(NAME, "logits of both models", [str(error)], notes)
    largest, smallest = BOUNDS[options.dtype]
    for batch, (distance, agreement) in zip([batch for batch, _ in jobs], results):
        text = (
            f"{batch.sample_ids[0]}: {batch.num_tokens} tokens, {batch.num_crops} crops, logits relative L2 "
            f"{distance:.1e}, same best token at {agreement:.2%} of the positions"
        )
        notes.append(text)
        if not (distance <= largest and agreement >= smallest):
            differences.append(f"{text}; allowed are {largest:.0e} and {smallest:.2%} in {options.dtype}")
    return Check.of(NAME, f"{len(images)} images in {options.dtype} on {options.device}", differences, notes)


def refusal(directory: Path, options: Options, needs_transformers: bool = True) -> str:
    """Why the comparison does not run; empty when it does."""
    code = ", ".join(name for name, _ in remote_code(directory)) or "no .py file"
    if not options.trust_remote_code:
        return (
            f"needs --trust-remote-code, which runs the Python files of the directory ({code}) with your "
            "rights; "
            "read them first"
        )
    auto_map = read_json_object(directory / "config.json", required=True).get("auto_map") or {}
    elsewhere = [str(target) for target in auto_map.values() if "--" in str(target)]
    if elsewhere:
        return f"auto_map of config.json points to code outside the directory: {', '.join(elsewhere)}"
    if needs_transformers and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install transformers==4.57.0 (the release's README)"
    if not (options.tokenizer or directory / "tokenizer.json").is_file():
        return (
            "no tokenizer.json: write one with transformers' "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(OUT) "
            "and give --tokenizer OUT/tokenizer.json"
        )
    return ""


def remote_code(directory: Path) -> list[tuple[str, str]]:
    """(name, SHA-256) of the Python files that a release brings."""
    return [
        (path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(directory.glob("*.py"))
    ]


def draw_images(folder: Path, model: ModelConfig) -> list[Path]:
    """Five PNGs whose sizes depend on the model's views: small, square, at the boundary, wide, tall."""
    large, small = model.vision.image_size, model.vision.crop_size
    sizes = [
        (large // 2, large // 3),
        (large, large),
        (large + 1, large),
        (2 * small, small),
        (small, 2 * small + 9),
    ]
    paths = []
    for number, (width, height) in enumerate(sizes):
        ramps = [Image.linear_gradient("L").rotate(90 * turn).resize((width, height)) for turn in range(3)]
        picture = Image.merge("RGB", ramps[number % 3 :] + ramps[: number % 3])
        pen = ImageDraw.Draw(picture)
        pen.ellipse((width // 5, height // 4, width // 2, height // 2), fill=(200, 30 * number, 20))
        pen.rectangle((width // 2, height // 2, width - 5, height - 5), fill=(10, 90, 40 * number), width=3)
        paths.append(folder / f"drawn{number}_{width}x{height}.png")
        picture.save(paths[-1])
    return paths


def our_inputs(image: Path, model: ModelConfig, tokenizer: Path) -> MicroBatch:
    """One image, question and answer through the data path of a run, as one dense row without padding.

    Raises:
        DataError: the image or the tokenizer is refused.
    """
    data = DataConfig(
        data_root=str(image.resolve().parent),
        tokenizer=str(tokenizer),
        loss_on="all_text",
        seq_length=1 << 20,
        max_crops=None,
        num_workers=0,
    )
    parts = [{"type": "image", "image": image.name}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": ANSWER}]
    builder = RowBuilder(data, model)
    line = json.dumps({"id": image.name, "messages": turns}).encode()
    row, images = builder.build(RawLine("verify_release", 1, line))
    if row.refused is not None:
        raise DataError(str(row.refused))
    sizes = (model.vision.image_size, model.vision.crop_size)
    batch = collate([row], len(row.ids), model.tokens.endoftext, *sizes)
    batch = builder.with_pixels(batch, [images], range(len(batch.view_kinds)))
    if batch.failed:
        raise DataError(str(batch.failed[0].record))
    return batch


def _run_release(
    directory: Path,
    images: Sequence[Path],
    batches: Sequence[MicroBatch],
    options: Options,
    folder: Path,
    load: Callable[[Path, torch.dtype, str], Release],
) -> list[str]:
    """Writes the logits of each image to `folder`; returns what differs before any model is involved."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    differences = []
    try:
        release = load(directory, dtype, options.device)
        for number, (image, batch) in enumerate(zip(images, batches)):
            inputs = release.inputs(PROMPT, image)
            found = [f"{image.name}: {text}" for text in input_differences(inputs, batch)]
            differences += found
            if not any("ids" in text for text in found):
                save_file({"logits": release.logits(inputs).contiguous()}, folder / f"{number}.safetensors")
    except MegatronVLError:
        raise
    except Exception as error:  # foreign code may fail in any way
        raise CheckpointError(f"the release's own code failed: {type(error).__name__}: {error}") from error
    finally:
        release = None
        gc.collect()
    return differences


def input_differences(inputs: dict[str, Any], batch: MicroBatch) -> list[str]:
    """ids and pixels of the release's processor against ours."""
    theirs, ours = inputs["input_ids"].flatten().tolist(), batch.input_ids.flatten().tolist()
    found = []
    if theirs != ours:
        at = next(
            (n for n, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1]), min(len(theirs), len(ours))
        )
        found.append(f"{len(theirs)} ids, ours {len(ours)}, from number {at} on {theirs[at : at + 8]}, ours "
                     f"{ours[at : at + 8]}")  # fmt: skip
    for name, mine in (("pixel_values", batch.global_pixels), ("patch_pixel_values", batch.crop_pixels)):
        pixels = inputs.get(name)
        if pixels is None:
            pixels = mine.new_empty(0, *mine.shape[1:])
        pixels = pixels.float().cpu().reshape(-1, *pixels.shape[-3:])
        if pixels.shape != mine.shape:
            found.append(f"{name} is {list(pixels.shape)}, ours {list(mine.shape)}")
        elif mine.numel() and not (largest := (pixels - mine).abs().max().item()) <= MAX_PIXEL_DIFFERENCE:
            found.append(f"{name} differs by up to {largest:.1e}, allowed is {MAX_PIXEL_DIFFERENCE:.0e}")
    return found


def _run_ours(
    directory: Path, model: ModelConfig, jobs: list[tuple[MicroBatch, Path]], options: Options
) -> list[tuple[float, float]]:
    """(relative L2, agreement) of each job, computed by one rank of its own."""
    if not jobs:
        return []
    # frozen: the check needs no gradients, and gradient buffers would take twice the room of the weights
    frozen = replace(model, freeze_vision=True, freeze_projector=True, freeze_decoder=True)
    config = RunConfig(
        model=frozen,
        parallel=ParallelConfig(device=options.device, use_distributed_optimizer=False),
        precision=PrecisionConfig(params=options.dtype),
    )
    with LocalWorld(1, options.device) as world:
        return world.run(1, _on_rank, config, directory, jobs, limit=6 * HOURS)[0]


@torch.no_grad()
def _on_rank(
    config: RunConfig, directory: Path, jobs: list[tuple[MicroBatch, Path]]
) -> list[tuple[float, float]]:
    device = choose_device(config.parallel.device)
    runtime = start(config.parallel, config.train.seed, device)
    model = (
        build(config, runtime, HFCheckpoint(directory).tensor, with_optimizer=False).chunks[0].module.eval()
    )
    results = []
    for batch, file in jobs:
        ours = model.logits(stage_inputs(batch, device))[:, 0]
        results.append(logit_distance(ours.float().cpu(), load_file(file)["logits"].float()))
    return results


def logit_distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(relative L2, share of positions with the same best token) of two [S, vocabulary] tensors.

    Raises:
        CheckpointError: the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise CheckpointError(f"logits of the release are {list(theirs.shape)}, ours {list(ours.shape)}")
    distance = (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()
    return distance, (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
