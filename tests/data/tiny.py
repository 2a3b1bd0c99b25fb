"""A tiny model description, a tokenizer and a few images for the tests of the data package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.bad_samples import BadSample
from megatron_vl.data.jsonl import RawLine
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.tokenizer import train_sentencepiece

MODEL = STEP3_VL_TINY
TOKENS = MODEL.tokens
TEXTS = ["What colour is the circle?", "The circle is red.", "user", "assistant", "How many shapes? 3"] * 20


def make_data(folder: Path, **changes: object) -> DataConfig:
    """Tokenizer and images in a folder: small.png (1 view), wide.png (3 crops), cut.jpg (truncated)."""
    train_sentencepiece(TEXTS, str(folder / "text.model"), vocab_size=300)
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "small.png")
    wide = Image.linear_gradient("L").resize((160, 60)).convert("RGB")
    wide.save(folder / "wide.png")
    wide.save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) - 200])
    config = DataConfig(
        data_root=str(folder),
        tokenizer=str(folder / "text.model"),
        seq_length=96,
        num_workers=0,
    )
    return replace(config, **changes)


def chat(question: str = "What colour?", answer: str = "red", *images: str, id: str | None = "q") -> dict:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
    return record if id is None else {"id": id, **record}


def raw(record: dict | bytes) -> RawLine:
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    return RawLine("lines.jsonl", 7, data)


def build(builder: RowBuilder, record: dict | bytes):
    return builder.build(raw(record))


def refusal(builder: RowBuilder, record: dict | bytes) -> BadSample:
    row, images = build(builder, record)
    assert row.refused is not None and len(row.ids) == 0 and not row.view_kinds and not images
    return row.refused


def write_jsonl(path: Path, records: list[dict | bytes]) -> str:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)
