"""Draw pictures and write the instruction data of the two tiny SFT stages.

    python examples/sft/quickstart/instructions.py --out runs/sft_quickstart/data --heldout runs/quickstart/data

writes under DIR:

    text/train.jsonl       conversations about a description in words; some are longer than a row
    vision/train.jsonl     conversations about new pictures, which lie in vision/images
    heldout_text.jsonl     one question a line about a description that is in no training conversation, in a form
    heldout_vision.jsonl   the quickstart's held-out questions, each asked for in a form

Every question is asked in one of three forms: plainly, as in the quickstart; for a sentence; for brackets. The form
of the answer must follow from the question, its content from the picture or the description. Everything follows
from the arguments: the same seed gives the same files.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "quickstart"))

from make_data import SOURCES, conversation, draw_all, image_hashes, in_turns, write_jsonl
from questions import (
    ANSWERS,
    QUESTIONS,
    QUESTIONS_PER_IMAGE,
    Picture,
    make_pictures,
)
from scenes import pick_size, single_scene

QUICKSTART = Path(__file__).resolve().parents[2] / "quickstart"
FORMS = {"plain": "", "sentence": " Give it in words.", "brackets": " Give it in a box."}
SENTENCES = {
    "colour": "It is {}.",
    "position": "It is {}.",
    "shape": "It is a {}.",
    "count": "There are {}.",
    "word": "It does say {}.",
    "box": "Its box is {}.",
}
ASKED_ABOUT_TEXT = ("colour", "position", "shape", "count", "word")
LONG_TURNS = 120  # longer than a row of the stages
# What pre-training has only begun to learn, and what a few hundred steps can teach: where the object is.
FOCUS = 0.75
FOCUS_CROPS = {0: 0.8, 4: 0.1, 6: 0.1}  # most of these pictures are one view, which costs the tower least
VISION, TEXT = "heldout_vision.jsonl", "heldout_text.jsonl"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument("--heldout", type=Path, required=True, help="data folder of the quickstart")
    parser.add_argument("--images", type=int, default=8000, help="training pictures (default %(default)s)")
    parser.add_argument("--texts", type=int, default=4000, help="descriptions (default %(default)s)")
    parser.add_argument("--heldout-texts", type=int, default=300, help="held-out ones (default %(default)s)")
    parser.add_argument(
        "--turns", type=int, default=3, help="questions in a conversation (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--workers", type=int, default=2, help="drawing processes (default %(default)s)")
    return parser.parse_args(argv)


def question_in(form: str, kind: str) -> str:
    """What the user writes."""
    return QUESTIONS[kind] + FORMS[form]


def answer_in(form: str, kind: str, answer: str) -> str:
    """The answer in the form that was asked for."""
    if form == "sentence":
        return SENTENCES[kind].format(answer)
    return f"[{answer}]" if form == "brackets" else answer


def describe(facts: dict[str, str]) -> str:
    """A scene in words, in the order of what can be asked."""
    return f"{facts['count']} {facts['colour']} {facts['shape']}, {facts['position']}, {facts['word']}."


def turns_of(pairs: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """(what the user writes, what is answered) for pairs (type, answer), each in a form by lot, half plainly."""
    forms = rng.choices(list(FORMS), weights=(2, 1, 1), k=len(pairs))
    return [(question_in(f, kind), answer_in(f, kind, answer)) for f, (kind, answer) in zip(forms, pairs)]


def text_conversation(name: str, facts: dict[str, str], turns: list[tuple[str, str]]) -> dict:
    """A description, then questions about it."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        question = question if number else f"{describe(facts)} {question}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages}


def draw_facts(number: int, rng: random.Random, seen: set[str]) -> list[dict[str, str]]:
    """Descriptions that differ from all in ``seen``, to which they are added."""
    found = []
    while len(found) < number:
        facts = {kind: rng.choice(ANSWERS[kind]) for kind in ASKED_ABOUT_TEXT}
        if describe(facts) not in seen:
            seen.add(describe(facts))
            found.append(facts)
    return found


def text_lines(number: int, heldout: int, turns: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Training conversations, one in a hundred of LONG_TURNS questions, and held-out questions."""
    rng, seen = random.Random(f"{seed} text"), set()
    held = []
    for index, facts in enumerate(draw_facts(heldout, rng, seen)):
        kind = ASKED_ABOUT_TEXT[index % len(ASKED_ABOUT_TEXT)]
        form = ("sentence", "brackets")[index // len(ASKED_ABOUT_TEXT) % 2]
        answer = answer_in(form, kind, facts[kind])
        line = text_conversation(f"text-{index:05d}", facts, [(question_in(form, kind), answer)])
        held.append(line | {"type": kind, "answer": answer})
    lines = []
    for index, facts in enumerate(draw_facts(number, rng, seen)):
        if index % 100 == 99:
            kinds = rng.choices(ASKED_ABOUT_TEXT, k=LONG_TURNS)
        else:
            kinds = rng.sample(ASKED_ABOUT_TEXT, k=turns)
        asked = turns_of([(kind, facts[kind]) for kind in kinds], rng)
        lines.append(text_conversation(f"t{index:05d}", facts, asked))
    return lines, held


def pictures_to_learn(number: int, seed: str) -> list[Picture]:
    """Pictures of every kind with the quickstart's questions, and FOCUS of them that ask where the object is."""
    rng = random.Random(seed)
    focused = [_place(rng) for _ in range(round(number * FOCUS))]
    rest = number - len(focused)
    return [*make_pictures(round(rest * QUESTIONS_PER_IMAGE), False, f"{seed} all"), *focused]


def _place(rng: random.Random) -> Picture:
    colour, shape, position = (rng.choice(ANSWERS[kind]) for kind in ("colour", "shape", "position"))
    size = pick_size(rng, rng.choices(list(FOCUS_CROPS), weights=list(FOCUS_CROPS.values()))[0])
    return Picture(single_scene(rng, size, colour, shape, position), (("position", position),))


def vision_lines(pictures: list, names: list[str], turns: int, seed: int) -> list[dict]:
    """Training conversations about pictures."""
    rng, lines = random.Random(f"{seed} forms"), []
    for index, (picture, name) in enumerate(zip(pictures, names)):
        for part, pairs in enumerate(in_turns(list(picture.asked), turns)):
            messages = conversation(name, pairs)
            for number, (question, answer) in enumerate(turns_of(pairs, rng)):
                messages[2 * number]["content"][-1]["text"] = question
                messages[2 * number + 1]["content"] = answer
            lines.append({"id": f"v{index:05d}-{part}", "messages": messages})
    rng.shuffle(lines)
    return lines


def heldout_in_forms(line: dict, number: int) -> dict:
    """A held-out line of the quickstart, asked for in a form that changes from line to line."""
    form = ("sentence", "brackets")[number % 2]
    user, _ = line["messages"]
    parts = [*user["content"][:-1], {"type": "text", "text": question_in(form, line["type"])}]
    answer = answer_in(form, line["type"], line["answer"])
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return line | {"answer": answer, "messages": messages}


def make_instructions(arguments: argparse.Namespace) -> None:
    """Plan, draw, write, check that no held-out picture is trained on."""
    folder, seed = arguments.out, arguments.seed
    settings = {name: str(value) for name, value in vars(arguments).items()}
    sources = [Path(__file__), *(QUICKSTART / name for name in SOURCES)]
    settings["generator_sha256"] = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text()) == settings:
        print(f"data: {folder} is up to date")
        return
    note.unlink(missing_ok=True)
    (folder / "vision" / "images").mkdir(parents=True, exist_ok=True)
    (folder / "text").mkdir(exist_ok=True)
    pictures = pictures_to_learn(arguments.images, f"{seed} sft")
    names = draw_all(folder / "vision", {"sft": pictures}, arguments.workers)["sft"]
    vision = vision_lines(pictures, names, arguments.turns, seed)
    texts, held_texts = text_lines(arguments.texts, arguments.heldout_texts, arguments.turns, seed)
    write_jsonl(folder / "vision" / "train.jsonl", vision)
    write_jsonl(folder / "text" / "train.jsonl", texts)
    write_jsonl(folder / TEXT, held_texts)
    plain = [json.loads(line) for line in (arguments.heldout / "heldout.jsonl").read_text().splitlines()]
    write_jsonl(folder / VISION, [heldout_in_forms(line, number) for number, line in enumerate(plain)])
    trained = set(image_hashes(folder / "vision", "train.jsonl").values())
    both = trained & set(image_hashes(arguments.heldout, "heldout.jsonl").values())
    if both:
        sys.exit(f"data: {len(both)} held-out pictures are also training pictures")
    note.write_text(json.dumps(settings, indent=1) + "\n")
    print(
        f"data: {len(vision)} conversations about {len(names)} new pictures, {len(texts)} about descriptions"
    )


if __name__ == "__main__":
    make_instructions(parse_arguments())
