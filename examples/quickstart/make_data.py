"""Draw the quickstart's pictures and write its questions.

    python examples/quickstart/make_data.py --out runs/quickstart/data

writes under DIR:

    images/*.png, *.jpg          the pictures
    train.jsonl                  conversations: a picture and its questions, in turns; some without a picture
    heldout.jsonl                one question a line, with "type" and "answer" beside the messages
    heldout_swapped.jsonl        the same lines, each with the picture of another question of its type
    heldout_no_image.jsonl       the same lines without pictures
    tokenizer.model              a SentencePiece model of the few words that occur
    settings.json                the arguments; written last, so that a complete folder is not drawn again

Everything follows from the arguments: the same seed gives the same files.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from questions import (
    ANSWERS,
    QUESTIONS,
    QUESTIONS_PER_IMAGE,
    Picture,
    count_answers,
    make_pictures,
    make_text_only,
)
from scenes import draw
from scoring import swap_partners

from megatron_vl.data.tokenizer import train_sentencepiece

# 256 bytes and about 220 pieces: every word that occurs becomes one token, and all ids stay below those
# of the special tokens of the preset step3_vl_tiny.
TOKENIZER_SIZE = 480
SETTINGS = "settings.json"
SOURCES = ("make_data.py", "questions.py", "scenes.py", "scoring.py")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument(
        "--train-images", type=int, default=3000, help="training pictures (default %(default)s)"
    )
    parser.add_argument(
        "--heldout-questions", type=int, default=1200, help="held-out questions, about (default %(default)s)"
    )
    parser.add_argument(
        "--text-only",
        type=float,
        default=0.15,
        help="training questions without a picture (default %(default)s)",
    )
    parser.add_argument(
        "--turns", type=int, default=3, help="questions in one training conversation (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--workers", type=int, default=2, help="drawing processes (default %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.train_images < 10 or arguments.heldout_questions < 60:
        parser.error("at least 10 training images and 60 held-out questions are needed")
    if not 0 <= arguments.text_only < 1 or arguments.turns < 1 or arguments.workers < 1:
        parser.error("text-only is a share below 1; turns and workers are at least 1")
    return arguments


def encode(picture: Picture) -> tuple[str, bytes]:
    """File name ending and file content of a picture: half are PNG, half JPEG of quality 85 to 95."""
    image = draw(picture.scene)
    rng = random.Random(picture.scene.seed + 1)
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        image.save(buffer, "PNG")
        return "png", buffer.getvalue()
    image.save(buffer, "JPEG", quality=rng.randint(85, 95), subsampling=0)
    return "jpg", buffer.getvalue()


def write_image(job: tuple[Path, str, Picture]) -> str:
    """Draw one picture into the data folder; returns its path relative to it."""
    folder, stem, picture = job
    ending, content = encode(picture)
    name = f"images/{stem}.{ending}"
    (folder / name).write_bytes(content)
    return name


def draw_all(folder: Path, splits: dict[str, list[Picture]], workers: int) -> dict[str, list[str]]:
    """Draw every picture of every split, saying how far it is; paths in the order of the pictures."""
    jobs = [
        (folder, f"{split}-{index:05d}", picture)
        for split, pictures in splits.items()
        for index, picture in enumerate(pictures)
    ]
    names = []
    # spawn: a forked copy of a process that has threads (torch, tensorstore) may hang or abort.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for name in pool.imap(write_image, jobs, chunksize=64):
            names.append(name)
            if len(names) % 1000 == 0 or len(names) == len(jobs):
                print(f"data: {len(names)} of {len(jobs)} images drawn", flush=True)
    result = {}
    for split, pictures in splits.items():
        result[split], names = names[: len(pictures)], names[len(pictures) :]
    return result


def conversation(image: str | None, pairs: Iterable[tuple[str, str]]) -> list[dict]:
    """OpenAI-style messages: the picture stands before the first question."""
    messages: list[dict] = []
    for kind, answer in pairs:
        content: list[dict] = [{"type": "text", "text": QUESTIONS[kind]}]
        if image is not None and not messages:
            content.insert(0, {"type": "image_url", "image_url": {"url": image}})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})
    return messages


def in_turns(pairs: list[tuple[str, str]], turns: int) -> list[list[tuple[str, str]]]:
    """Cut a list of questions into conversations of at most ``turns``."""
    return [pairs[start : start + turns] for start in range(0, len(pairs), turns)]


def training_lines(
    pictures: list[Picture], names: list[str], text_only: float, turns: int, seed: int
) -> list[dict]:
    """Training conversations in random order; ``text_only`` of all questions come without a picture."""
    lines = []
    for index, (picture, name) in enumerate(zip(pictures, names)):
        for part, pairs in enumerate(in_turns(list(picture.asked), turns)):
            lines.append({"id": f"train-{index:05d}-{part}", "messages": conversation(name, pairs)})
    asked = sum(len(picture.asked) for picture in pictures)
    without = round(asked * text_only / (1 - text_only))
    blind = make_text_only(without, f"{seed} text only") if without else []
    for index, pairs in enumerate(in_turns(blind, turns)):
        lines.append({"id": f"text-{index:05d}", "messages": conversation(None, pairs)})
    random.Random(f"{seed} order").shuffle(lines)
    return lines


def heldout_lines(pictures: list[Picture], names: list[str], seed: int) -> dict[str, list[dict]]:
    """The three held-out files, line by line about the same question, by file name."""
    questions = [
        (f"heldout-{index:05d}-{kind}", kind, answer, name)
        for index, (picture, name) in enumerate(zip(pictures, names))
        for kind, answer in picture.asked
    ]
    partners = swap_partners([kind for _, kind, _, _ in questions], [q[2] for q in questions], seed)
    images = {
        "heldout": [name for _, _, _, name in questions],
        "heldout_swapped": [questions[partner][3] for partner in partners],
        "heldout_no_image": [None] * len(questions),
    }
    return {
        f"{file}.jsonl": [
            {"id": key, "type": kind, "answer": answer, "messages": conversation(image, [(kind, answer)])}
            for (key, kind, answer, _), image in zip(questions, shown)
        ]
        for file, shown in images.items()
    }


def image_hashes(folder: Path, jsonl: str) -> dict[str, str]:
    """SHA-256 of the decoded pixels of every picture that a JSONL file names, by relative path."""
    names = set()
    for line in (folder / jsonl).read_text(encoding="utf-8").splitlines():
        for message in json.loads(line)["messages"]:
            if isinstance(message["content"], list):
                names |= {
                    part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"
                }
    hashes = {}
    for name in sorted(names):
        with Image.open(folder / name) as image:
            pixels = image.convert("RGB")
        hashes[name] = hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest()
    return hashes


def check_disjoint(folder: Path) -> tuple[int, int]:
    """Numbers of training and held-out pictures, after checking that none is in both, by content.

    Raises SystemExit naming the pictures otherwise.
    """
    training, heldout = (image_hashes(folder, f"{name}.jsonl") for name in ("train", "heldout"))
    seen = {digest: name for name, digest in training.items()}
    both = [f"{name} = {seen[digest]}" for name, digest in heldout.items() if digest in seen]
    if both:
        sys.exit(f"data: {len(both)} held-out images are also training images: {', '.join(both[:5])}")
    return len(training), len(heldout)


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: every question and answer, role names and digits.

    The list does not depend on the pictures drawn, so neither does the tokenizer.
    """
    answers = [answer for kind in ANSWERS for answer in ANSWERS[kind]]
    boxes = [f"{digit} {digit}" for digit in range(10)]
    return ["user\n", "assistant\n", *QUESTIONS.values(), *answers, *boxes] * 10


def write_jsonl(path: Path, lines: list[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def settings_of(arguments: argparse.Namespace) -> dict:
    """What the files depend on: the arguments and the generator's own source."""
    here = Path(__file__).parent
    source = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES)).hexdigest()
    names = ("train_images", "heldout_questions", "text_only", "turns", "seed")
    return {name: getattr(arguments, name) for name in names} | {"generator_sha256": source}


def is_made(folder: Path, settings: dict) -> bool:
    """Whether the folder already holds exactly these data."""
    path = folder / SETTINGS
    return path.exists() and json.loads(path.read_text(encoding="utf-8")) == settings


def make_data(arguments: argparse.Namespace) -> None:
    """Plan, draw, write, check."""
    started, folder, seed = time.monotonic(), arguments.out, arguments.seed
    settings = settings_of(arguments)
    if is_made(folder, settings):
        print(f"data: {folder} is up to date")
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).unlink(missing_ok=True)
    for old in (folder / "images").iterdir():
        old.unlink()
    splits = {
        "train": make_pictures(round(arguments.train_images * QUESTIONS_PER_IMAGE), False, f"{seed} train"),
        "heldout": make_pictures(arguments.heldout_questions, True, f"{seed} heldout"),
    }
    names = draw_all(folder, splits, arguments.workers)
    training = training_lines(splits["train"], names["train"], arguments.text_only, arguments.turns, seed)
    write_jsonl(folder / "train.jsonl", training)
    heldout = heldout_lines(splits["heldout"], names["heldout"], seed)
    for file, lines in heldout.items():
        write_jsonl(folder / file, lines)
    train_sentencepiece(tokenizer_texts(), str(folder / "tokenizer.model"), TOKENIZER_SIZE)
    n_train, n_heldout = check_disjoint(folder)
    tallies = count_answers([(line["type"], line["answer"]) for line in heldout["heldout.jsonl"]])
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    asked = sum(len(line["messages"]) // 2 for line in training)
    print(f"data: {n_train} training images, {asked} questions in {len(training)} conversations")
    listed = ", ".join(f"{kind} {sum(tally.values())}" for kind, tally in tallies.items())
    print(f"data: {n_heldout} held-out images, questions: {listed}; no image is in both")
    print(f"data: {folder} written in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    make_data(parse_arguments())
