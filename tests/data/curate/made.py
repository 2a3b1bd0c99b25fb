"""Made-up images, texts and runs for the tests of curation. Everything follows from a seed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from megatron_vl.data.curate.rules import CurationConfig, Source

SYLLABLES = [
    first + second for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "ar", "en", "ol")
]


def words(count: int, seed: int) -> list[str]:
    """Invented words of two or three syllables: about a million different ones."""
    draw = random.Random(seed)
    return ["".join(draw.choices(SYLLABLES, k=draw.choice((2, 3)))) for _ in range(count)]


def text(count: int, seed: int) -> str:
    return " ".join(words(count, seed))


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Smooth coloured noise: unlike any other seed, and itself again after resizing."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Resampling.BICUBIC)


def pair(path: str, caption: str, id: str, **extra: object) -> dict:
    content = [{"type": "image", "image": path}, {"type": "text", "text": caption}]
    return {"id": id, "content": content, **extra}


def chat(question: str, answer: str, id: str, *images: str) -> dict:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": id, "messages": messages}


def write_jsonl(path: Path, records: list[dict | bytes]) -> str:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def config_for(
    root: Path, records: list[dict | bytes], output: str = "out", **sections: object
) -> CurationConfig:
    """A run over one source `web` below `root`. sections: replaced as a whole."""
    files = [write_jsonl(root / "web.jsonl", records)]
    config = CurationConfig(output=str(root / output), sources=[Source("web", files)], data_root=str(root))
    return replace(config, chunk_samples=3, **sections)


def output_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of the output but the state."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "state" not in path.relative_to(folder).parts
    }
