"""Planted overlaps are all found, near misses and clean text are not."""

import json
import random

import numpy as np
import pytest

from megatron_vl.data.curate.benchmarks import Item, read_benchmarks
from megatron_vl.data.curate.decontaminate import BenchmarkIndex, TextLines, build_index
from megatron_vl.data.curate.rules import PROMPT_FIELDS
from megatron_vl.data.sample import parse_sample
from megatron_vl.errors import DataError
from tests.data.curate.made import chat, text, words

LONG = [text(150, 10_000 + seed) for seed in range(40)]
SHORT = [f"What is {number} + {number * 7 + 1}, {text(4, 900 + number)}?" for number in range(40)]
ITEMS = [Item(f"bench.jsonl:{number}.question", value) for number, value in enumerate(LONG + SHORT)]


@pytest.fixture(scope="module")
def index():
    return build_index(ITEMS, 64, 1)[0]


def find(index, *turns):
    return index.find(TextLines([[turn] if isinstance(turn, str) else turn for turn in turns]))


def variants(value: str) -> list[str]:
    """The same words in other clothes."""
    tokens = value.split()
    return [
        value.upper(),
        "\n".join(tokens),
        "\u00a0 ".join(tokens),
        value.replace("a", "\uff41"),
        "".join(letter + "\u00ad" if letter == "e" else letter for letter in value),
        value.replace("fi", "\ufb01"),
        "\u201c" + value + "\u201d",
    ]


def test_every_planted_window_is_found(index):
    """64 words of a benchmark, wherever they were cut out and wherever they stand in a document."""
    draw = random.Random(5)
    for number, item in enumerate(LONG):
        tokens = item.split()
        for start in (0, 43, len(tokens) - 64):
            window = " ".join(tokens[start : start + 64])
            for place in (0, draw.randrange(1, 300), 300):
                before, after = text(place, 7000 + number), text(300 - place, 8000 + number)
                found = find(index, f"{before} {window} {after}")
                assert found is not None and found.reason == "ngram_overlap"
                assert index.names[found.item] == f"bench.jsonl:{number}.question"
                assert f"from word {place} on" in found.detail


def test_63_words_are_not_an_overlap_and_64_are(index):
    tokens = LONG[3].split()
    around = [text(100, 1), text(100, 2)]
    assert find(index, " ".join([around[0], *tokens[10:73], around[1]])) is None
    assert find(index, " ".join([around[0], *tokens[10:74], around[1]])).reason == "ngram_overlap"


def test_one_changed_word_in_the_middle_hides_the_window(index):
    tokens = LONG[3].split()[:64]
    assert find(index, " ".join([*tokens[:32], "otherword", *tokens[33:]])) is None


@pytest.mark.parametrize("cut", [1, 20, 32, 63])
def test_windows_are_found_across_parts_turns_and_images(index, cut):
    tokens = LONG[7].split()[30:94]
    first, second = " ".join(tokens[:cut]), " ".join(tokens[cut:])
    before, after = text(50, 1), text(50, 2)
    assert find(index, [before, first, second, after]).reason == "ngram_overlap"
    assert find(index, f"{before} {first}", f"{second} {after}").reason == "ngram_overlap"
    page = {"content": [f"{before} {first}", "IMAGE", f"{second} {after}"]}
    page["content"] = [
        {"type": "image", "image": "a.png"} if part == "IMAGE" else {"type": "text", "text": part}
        for part in page["content"]
    ]
    sample = parse_sample(json.dumps(page).encode(), "page")
    assert index.find(TextLines.of_sample(sample)).reason == "ngram_overlap"


def test_variants_of_windows_and_of_items_are_found(index):
    for number in range(5):
        window = " ".join(LONG[number].split()[20:84])
        for variant in variants(window):
            assert find(index, f"{text(30, 1)} {variant} {text(30, 2)}").reason == "ngram_overlap", variant
        for variant in variants(SHORT[number]):
            found = find(index, variant)
            assert found is not None and found.reason == "exact_overlap", variant
            assert found.item == len(LONG) + number


def test_items_are_found_as_turn_part_line_and_whole(index):
    short = SHORT[4]
    for turns in (
        [short],
        ["hello there", short],
        [["intro", short]],
        [f"{text(9, 1)}\n{short}\n{text(9, 2)}"],
    ):
        assert find(index, *turns).reason == "exact_overlap"
    two_lines = build_index([Item("i", "alpha beta\ngamma delta")], 64, 1)[0]
    assert find(two_lines, ["alpha beta", "gamma delta"]).reason == "exact_overlap"


def test_an_item_inside_a_longer_line_is_no_exact_match(index):
    assert find(index, f"so {SHORT[4]}") is None
    assert find(index, f"{SHORT[4]} Why") is None


def test_signs_count_in_exact_matches(index):
    other = SHORT[4].replace("+", "-")
    assert other != SHORT[4] and find(index, other) is None


def test_the_clean_control_has_no_finding(index):
    """3,000 documents from the same words as the benchmarks, which do not share 64 in a row."""
    pool = words(400, 77) + [word for item in LONG for word in item.split()]
    draw = random.Random(3)
    for number in range(3000):
        document = " ".join(draw.choices(pool, k=draw.randrange(20, 200)))
        assert find(index, document) is None, number


def test_hash_collisions_are_not_findings():
    """A hit of the hash alone is not believed: with equal hashes and other words nothing is found."""
    good, _ = build_index([Item("i", LONG[0])], 64, 1)
    forged = BenchmarkIndex(**{**good.__dict__, "words": good.words + np.uint64(1)})
    assert find(good, LONG[0]) is not None
    assert find(forged, LONG[0]) is None


def test_counts_and_short_items():
    items = [Item("a", "???"), Item("b", "two words"), Item("c", LONG[0])]
    index, counts = build_index(items, 64, 3)
    assert counts == {"items": 3, "without_words": 1, "too_short_for_exact": 1, "too_short_for_ngram": 1}
    assert find(index, "two words") is None and find(index, LONG[0]) is not None


def test_an_index_survives_saving(tmp_path, index):
    index.save(str(tmp_path / "i"))
    loaded = BenchmarkIndex.load(str(tmp_path / "i"))
    assert find(loaded, LONG[5]) == find(index, LONG[5])
    empty, _ = build_index([Item("s", "short one")], 64, 1)
    empty.save(str(tmp_path / "e"))
    assert find(BenchmarkIndex.load(str(tmp_path / "e")), LONG[5]) is None


def write_folder(folder):
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        json.dumps({"question": "Alpha?", "answer": "no"}) + "\n\n" + json.dumps(chat("Beta?", "b", "x"))
    )
    (folder / "b.json").write_text(
        json.dumps({"data": [{"problem": "Gamma", "solution": "Delta"}, {"other": 1}]})
    )
    (folder / "c.tsv").write_text("index\tquestion\timage\n5\tEpsilon\t" + "A" * 200_000 + "\n")
    (folder / "d.txt").write_text("Zeta one\nstill\n\nEta")
    (folder / "e.json").write_text(
        json.dumps(
            [{"conversations": [{"from": "human", "value": "<image>\nTheta"}, {"from": "gpt", "value": "x"}]}]
        )
    )
    (folder / "notes.pdf").write_bytes(b"%PDF")
    (folder / "sub").mkdir()
    (folder / "sub" / "p.png").write_bytes(b"x")


def test_folders_are_read_whole(tmp_path):
    write_folder(tmp_path / "b")
    folder = read_benchmarks(str(tmp_path / "b"), PROMPT_FIELDS, with_images=True)
    assert [(item.name, item.text) for item in folder.items] == [
        ("a.jsonl:1.question", "Alpha?"),
        ("a.jsonl:3.messages[0]", "Beta?"),
        ("b.json:0.problem", "Gamma"),
        ("b.json:0.solution", "Delta"),
        ("b.json:0", "Gamma\nDelta"),
        ("c.tsv:5.question", "Epsilon"),
        ("d.txt:1", "Zeta one\nstill"),
        ("d.txt:2", "Eta"),
        ("d.txt", "Zeta one\nstill\n\nEta"),
        ("e.json:0.conversations[0]", "<image>\nTheta"),
    ]
    assert folder.images == ["sub/p.png"] and folder.unused == {".pdf": 1}
    assert folder.without_text == {"b.json": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"unknown": "x"}', "decontamination.fields"),
        ("a.jsonl", b'{"question": "x"', "cannot be read as jsonl"),
        ("a.json", b"3", "neither a list nor an object"),
        ("a.txt", b"\xff\xfe", "cannot be read as txt"),
        ("a.pdf", b"x", "holds no benchmark"),
        ("a.json", b"[" * 100_000, "cannot be read as json"),
    ],
)
def test_a_benchmark_that_cannot_be_used_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_benchmarks(str(tmp_path), PROMPT_FIELDS, with_images=False)
