"""New pictures for the RL quickstart: conversations that prepare the model, and prompts with tasks.

    python examples/rl/make_prompts.py --quickstart runs/quickstart/data --out runs/rl_quickstart/data

writes under DIR:

    images/                  new pictures of three kinds of question, position, count and box; held-out ones, copied
    prepare.jsonl            conversations about the first part of them, for the short SFT; some without a picture
    train.jsonl              prompts about the others: no answer of theirs was ever shown to the model
    heldout.jsonl            prompts from the quickstart's held-out questions, each with its picture, with the picture
                             of another question of its type, and without one (sources count, count swapped, ...)

--shuffled gives every training prompt the answer of another one of its type: a control, whose rewards say nothing
about the picture. Everything follows from the arguments: the same seed gives the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quickstart"))

from make_data import SOURCES, conversation, draw_all, image_hashes, write_jsonl
from questions import ANSWERS, Picture
from scenes import count_scene, pick_size, single_scene

# Colours are right from the start, so there is nothing to learn. Shapes and words are beyond the quickstart's tower
# (no better than chance after pre-training), and the tower is frozen here.
TYPES = ("position", "count", "box")
HELDOUT = {"": "heldout.jsonl", " swapped": "heldout_swapped.jsonl", " no image": "heldout_no_image.jsonl"}
# The tower learns from boxes where things are; what places are called is left to the rewards, but for a few examples.
PREPARED = (*("box", "count") * 9, "box", "position")
REINFORCED = ("position", "count", "position", "box")
GRID = 10  # boxes are given in cells
CROPS = {0: 0.7, 2: 0.1, 4: 0.15, 6: 0.05}  # by number; most pictures are one view, which costs the least
WITHOUT = 0.1  # of the conversations: the model stays one that knows what to say without a picture
SETTINGS = "settings.json"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="data folder of the quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument(
        "--prepare", type=int, default=6000, help="pictures of the short SFT (default %(default)s)"
    )
    parser.add_argument("--prompts", type=int, default=4000, help="pictures of prompts (default %(default)s)")
    parser.add_argument(
        "--per-type", type=int, default=120, help="held-out questions of each type (default %(default)s)"
    )
    parser.add_argument("--shuffled", type=int, help="seed: shuffle the answers of the prompts (a control)")
    parser.add_argument("--seed", type=int, default=4321)
    parser.add_argument("--workers", type=int, default=2, help="drawing processes (default %(default)s)")
    return parser.parse_args(argv)


def task_of(kind: str, answer: str) -> dict:
    """What the verifier is told. A box earns its overlap with the right one."""
    if kind == "box":
        cells = [int(cell) for cell in answer.split()]
        about = {"kind": "box", "answer": cells, "image_size": [GRID, GRID], "coordinates": "pixel"}
    elif kind == "count":
        about = {"kind": "count", "answer": int(answer)}
    else:
        about = {"kind": "exact", "answer": answer}
    return {**about, "thinking": False}


def plan_pictures(number: int, cycle: tuple[str, ...], seed: str) -> list[Picture]:
    """Pictures with one question each. cycle: its type, by turns."""
    rng = random.Random(seed)
    return [_picture(rng, cycle[index % len(cycle)]) for index in range(number)]


def _picture(rng: random.Random, kind: str) -> Picture:
    facts = {name: rng.choice(ANSWERS[name]) for name in ("colour", "shape", "position", "count")}
    size = pick_size(rng, rng.choices(list(CROPS), weights=list(CROPS.values()))[0])
    if kind == "count":
        scene = count_scene(rng, size, facts["colour"], facts["shape"], int(facts["count"]))
        return Picture(scene, (("count", facts["count"]),))
    scene = single_scene(rng, size, facts["colour"], facts["shape"], facts["position"])
    return Picture(scene, ((kind, scene.box() if kind == "box" else facts["position"]),))


def preparing(pictures: list[Picture], names: list[str], seed: str) -> list[dict]:
    """Conversations of one question; WITHOUT of them do not show the picture."""
    rng = random.Random(seed)
    return [
        {
            "id": f"s{index:05d}",
            "messages": conversation(None if rng.random() < WITHOUT else name, picture.asked),
        }
        for index, (picture, name) in enumerate(zip(pictures, names))
    ]


def prompt(name: str, source: str, user: dict, task: dict) -> dict:
    """One line of a prompt file. user: the message with picture and question."""
    return {"id": name, "source": source, "messages": [user], "task": task}


def training_prompts(pictures: list[Picture], names: list[str], shuffled: int | None) -> list[dict]:
    """A prompt for each question. shuffled: a seed, None for the right answers."""
    asked = [(name, kind, answer) for p, name in zip(pictures, names) for kind, answer in p.asked]
    answers = [answer for *_, answer in asked]
    if shuffled is not None:
        for kind in TYPES:
            members = [index for index, q in enumerate(asked) if q[1] == kind]
            mixed = random.Random(f"{shuffled} {kind}").sample([answers[i] for i in members], len(members))
            for index, answer in zip(members, mixed):
                answers[index] = answer
    return [
        prompt(
            f"p{number:05d}-{kind}",
            kind,
            conversation(name, [(kind, given)])[0],
            task_of(kind, answers[number]),
        )
        for number, (name, kind, given) in enumerate(asked)
    ]


def heldout_prompts(folder: Path, per_type: int) -> list[dict]:
    """The first ``per_type`` held-out questions of each type, in three forms."""
    found = []
    for suffix, file in HELDOUT.items():
        seen: Counter[str] = Counter()
        for text in (folder / file).read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            kind, user = line["type"], line["messages"][0]
            seen[kind] += 1
            if kind in TYPES and seen[kind] <= per_type:
                task = task_of(kind, line["answer"])
                found.append(prompt(line["id"] + suffix, kind + suffix, user, task))
    return found


def make_prompts(arguments: argparse.Namespace) -> None:
    """Plan, draw, write, check that no held-out picture is among the new ones."""
    folder, seed = arguments.out, arguments.seed
    settings = {name: str(value) for name, value in vars(arguments).items()}
    here = Path(__file__)
    sources = [here, *(here.parent.parent / "quickstart" / name for name in SOURCES)]
    settings["generator_sha256"] = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    note = folder / SETTINGS
    if note.exists() and json.loads(note.read_text()) == settings:
        print(f"data: {folder} is up to date")
        return
    note.unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    splits = {
        "prepare": plan_pictures(arguments.prepare, PREPARED, f"{seed} prepare"),
        "prompt": plan_pictures(arguments.prompts, REINFORCED, f"{seed} prompts"),
    }
    names = draw_all(folder, splits, arguments.workers)
    lines = {
        "prepare": preparing(splits["prepare"], names["prepare"], f"{seed} order"),
        "train": training_prompts(splits["prompt"], names["prompt"], arguments.shuffled),
        "heldout": heldout_prompts(arguments.quickstart, arguments.per_type),
    }
    for picture in image_hashes(arguments.quickstart, "heldout.jsonl"):
        shutil.copyfile(arguments.quickstart / picture, folder / picture)
    for name, written in lines.items():
        write_jsonl(folder / f"{name}.jsonl", written)
    drawn = image_hashes(folder, "prepare.jsonl") | image_hashes(folder, "train.jsonl")
    held = image_hashes(folder, "heldout.jsonl")
    both = set(drawn.values()) & set(held.values())
    if both:
        sys.exit(f"data: {len(both)} held-out pictures are also training pictures")
    note.write_text(json.dumps(settings, indent=1) + "\n")
    print(f"data: {len(lines['prepare'])} conversations to prepare the model")
    for name in ("train", "heldout"):
        counts = Counter(line["source"] for line in lines[name])
        told = ", ".join(f"{kind} {count}" for kind, count in counts.items())
        print(f"prompts: {folder / name}.jsonl: {told}", flush=True)


if __name__ == "__main__":
    make_prompts(parse_arguments())
