"""Prompts with tasks from the quickstart's questions.

    python examples/rl/make_prompts.py --data runs/quickstart/data --out runs/rl_quickstart/data

writes train.jsonl (training pictures) and heldout.jsonl: for each held-out question one prompt with its picture, one
with the picture of another question of its type, and one without (sources `count`, `count swapped`, `count no image`).
--shuffled gives every training question the answer of another one of its type: a control, whose rewards say nothing
about the picture.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

# Colours are right from the start, so there is nothing to learn; words and positions are hardly ever right.
TYPES = {"What shape is it?": "shape", "How many are there?": "count", "Give its box.": "box"}
HELDOUT = {"": "heldout.jsonl", " swapped": "heldout_swapped.jsonl", " no image": "heldout_no_image.jsonl"}
GRID = 10  # boxes are given in cells


def task_of(kind: str, answer: str) -> dict:
    """What the verifier is told. A box earns its overlap with the right one."""
    if kind == "box":
        cells = [int(cell) for cell in answer.split()]
        about = {"kind": "box", "answer": cells, "image_size": [GRID, GRID], "coordinates": "pixel"}
    elif answer.isdigit():
        about = {"kind": "count", "answer": int(answer)}
    else:
        about = {"kind": "exact", "answer": answer}
    return {**about, "thinking": False}


def questions(path: Path) -> list[tuple[str, str, str, list[dict], str]]:
    """(id, type, question, parts before the text, answer) of every question of a known type in a file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        messages = record["messages"]
        pictures = [part for part in messages[0]["content"] if part["type"] == "image_url"]
        for asked, answered in zip(messages[::2], messages[1::2]):
            text = asked["content"][-1]["text"]
            if text in TYPES:
                kind = TYPES[text]
                found.append((f"{record['id']}-{kind}", kind, text, pictures, answered["content"]))
    return found


def prompt(name: str, source: str, text: str, pictures: list[dict], task: dict) -> dict:
    """One line of a prompt file."""
    content = [*pictures, {"type": "text", "text": text}]
    return {"id": name, "source": source, "messages": [{"role": "user", "content": content}], "task": task}


def training_prompts(path: Path, shuffled: int | None) -> list[dict]:
    """Questions about a picture. shuffled: a seed, None for the right answers."""
    asked = [q for q in questions(path) if q[3]]
    answers = [answer for *_, answer in asked]
    if shuffled is not None:
        for kind in sorted(set(TYPES.values())):
            members = [index for index, q in enumerate(asked) if q[1] == kind]
            mixed = random.Random(f"{shuffled} {kind}").sample([answers[i] for i in members], len(members))
            for index, answer in zip(members, mixed):
                answers[index] = answer
    return [
        prompt(name, kind, text, pictures, task_of(kind, answer))
        for (name, kind, text, pictures, _), answer in zip(asked, answers)
    ]


def heldout_prompts(folder: Path, per_type: int) -> list[dict]:
    """The first ``per_type`` held-out questions of each type, in three forms."""
    found = []
    for suffix, file in HELDOUT.items():
        seen: Counter[str] = Counter()
        for name, kind, text, pictures, answer in questions(folder / file):
            seen[kind] += 1
            if seen[kind] <= per_type:
                found.append(prompt(name + suffix, kind + suffix, text, pictures, task_of(kind, answer)))
    return found


def make_prompts(data: Path, out: Path, per_type: int = 60, shuffled: int | None = None) -> None:
    """Write both files."""
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in (
        ("train", training_prompts(data / "train.jsonl", shuffled)),
        ("heldout", heldout_prompts(data, per_type)),
    ):
        (out / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        listed = ", ".join(
            f"{kind} {count}" for kind, count in Counter(line["source"] for line in lines).items()
        )
        print(f"prompts: {out / name}.jsonl: {listed}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the quickstart's data folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--per-type", type=int, default=60, help="held-out questions of each type (default %(default)s)"
    )
    parser.add_argument("--shuffled", type=int, help="seed: shuffle the training answers (a control)")
    given = parser.parse_args()
    make_prompts(given.data, given.out, given.per_type, given.shuffled)
