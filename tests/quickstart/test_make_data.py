"""The quickstart's data: balanced, disjoint, repeatable, and cut into every possible number of crops."""

import json
import random
from collections import Counter
from pathlib import Path

import make_data
import pytest
import questions
import scenes
from PIL import Image

from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.crops import CropRule, plan_crops
from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.rows import RowBuilder

ARGUMENTS = ["--train-images", "40", "--heldout-questions", "150", "--workers", "1"]


def generate(folder: Path, *more: str) -> Path:
    make_data.make_data(make_data.parse_arguments(["--out", str(folder), *ARGUMENTS, *more]))
    return folder


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def images_of(line: dict) -> list[str]:
    contents = [message["content"] for message in line["messages"] if message["role"] == "user"]
    return [
        part["image_url"]["url"] for content in contents for part in content if part["type"] == "image_url"
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("made"))


def test_every_picture_decodes_and_no_heldout_one_is_trained_on(made):
    trained, held = make_data.check_disjoint(made)
    files = sorted((made / "images").iterdir())
    assert trained + held == len(files) and trained >= 35
    formats = Counter()
    for file in files:
        with Image.open(file) as image:
            image.load()
            formats[image.format] += 1
    assert min(formats["PNG"], formats["JPEG"]) > len(files) // 4


def test_a_heldout_picture_among_the_training_ones_is_found_by_content(made, tmp_path):
    (tmp_path / "images").mkdir()
    (name,) = images_of(read(made, "heldout.jsonl")[0])
    with Image.open(made / name) as image:
        # Stored again under another name and in another format: the pixels decide.
        image.save(tmp_path / "images" / "a.png")
        image.save(tmp_path / "images" / "b.bmp")
    for split, file in (("train", "a.png"), ("heldout", "b.bmp")):
        make_data.write_jsonl(
            tmp_path / f"{split}.jsonl",
            [{"messages": make_data.conversation(f"images/{file}", [("word", "x")])}],
        )
    with pytest.raises(
        SystemExit, match="1 held-out images are also training images: images/b.bmp = images/a.png"
    ):
        make_data.check_disjoint(tmp_path)


def test_heldout_answers_are_balanced_and_the_three_files_differ_only_in_pictures(made):
    plain, swapped, blind = (read(made, f"heldout{name}.jsonl") for name in ("", "_swapped", "_no_image"))
    for lines in zip(plain, swapped, blind):
        assert len({(line["id"], line["type"], line["answer"]) for line in lines}) == 1
        shown = [images_of(line) for line in lines]
        assert len(shown[0]) == len(shown[1]) == 1 and shown[2] == [] and shown[0] != shown[1]
    tallies = questions.count_answers([(line["type"], line["answer"]) for line in plain])
    for kind, tally in tallies.items():
        assert len(set(tally.values())) == 1, f"{kind}: {tally}"
        if kind != "box":
            assert set(tally) == set(questions.ANSWERS[kind])
    # A swapped picture answers a question of the same type, so the question still makes sense.
    asked = {(line["type"], images_of(line)[0]) for line in plain}
    assert all((line["type"], images_of(line)[0]) in asked for line in swapped)


def test_the_share_of_text_only_questions(made):
    lines = read(made, "train.jsonl")
    turns = {True: 0, False: 0}
    for line in lines:
        turns[bool(images_of(line))] += len(line["messages"]) // 2
        assert len(line["messages"]) <= 6
    assert turns[False] / sum(turns.values()) == pytest.approx(0.15, abs=0.03)


def test_every_line_fits_the_preset_and_a_row_of_80_tokens(made):
    data = DataConfig(data_root=str(made), tokenizer=str(made / "tokenizer.model"), seq_length=80)
    builder = RowBuilder(data, STEP3_VL_TINY)
    for name in ("train", "heldout", "heldout_swapped", "heldout_no_image"):
        source = JsonlSource([str(made / f"{name}.jsonl")])
        for index in range(len(source)):
            row, images = builder.build(source[index])
            assert len(row.ids) > 10, row
            assert len(images) == (
                name in ("heldout", "heldout_swapped") or row.sample_id.startswith("train")
            )
    encode = builder.template.tokenizer.encode
    long = [
        answer for kind in questions.ANSWERS for answer in questions.ANSWERS[kind] if len(encode(answer)) > 2
    ]
    assert long == [] and len(encode("0 1 8 9")) == 7


def test_the_seed_decides_everything_and_a_finished_folder_is_kept(made, tmp_path, capsys):
    again = generate(tmp_path / "again", "--workers", "2")
    for file in sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file()):
        assert (made / file).read_bytes() == (again / file).read_bytes(), file
    other = generate(tmp_path / "other", "--seed", "7")
    assert (other / "train.jsonl").read_bytes() != (made / "train.jsonl").read_bytes()
    capsys.readouterr()
    generate(other, "--seed", "7")
    assert capsys.readouterr().out == f"data: {other} is up to date\n"


def test_crop_families_give_the_crops_they_name():
    rule = CropRule.for_model(112, 56)
    for crops, (long_range, short_range) in scenes.CROP_FAMILIES.items():
        for long_side in range(long_range[0], long_range[1] + 1):
            for short_side in range(short_range[0], min(short_range[1], long_side) + 1):
                assert plan_crops(long_side, short_side, rule).num_crops == crops, (long_side, short_side)
                assert plan_crops(short_side, long_side, rule).num_crops == crops, (short_side, long_side)


def test_no_size_gives_exactly_one_crop():
    rule = CropRule.for_model(112, 56)
    found = {plan_crops(w, h, rule).num_crops for w in range(2, 340, 3) for h in range(2, 340, 3)}
    assert {0, 2, 3, 4, 5, 6} <= found and 1 not in found


def test_all_crop_numbers_occur_in_both_splits():
    rule = CropRule.for_model(112, 56)
    for split, exact in ((6600, False), (1200, True)):
        pictures = questions.make_pictures(split, exact, "seed")
        crops = Counter(plan_crops(*picture.scene.size, rule).num_crops for picture in pictures)
        assert set(crops) == {0, 2, 3, 4, 5, 6}
        assert min(crops.values()) > 10


def test_pictures_show_what_their_answers_say():
    background, cells = (0, 0, 0), set()
    rng = random.Random(3)
    for position in scenes.POSITIONS:
        scene = scenes.single_scene(rng, (110, 90), "red", "square", position)
        scene = scenes.Scene(scene.size, "red", "square", scene.objects, None, background, 0.0, 1)
        image = scenes.draw(scene)
        left, top, right, bottom = image.getbbox()
        assert (left, top, right, bottom) == scene.objects[0]
        red, green, blue = image.getpixel(((left + right) // 2, (top + bottom) // 2))
        assert red > 190 and max(green, blue) < 60
        x0, y0, x1, y1 = map(int, scene.box().split())
        assert x0 == int(left / 11) and y1 == int((bottom - 1) / 9) and x1 <= 9 and y0 <= y1
        cells.add((int(3 * (top + bottom) / 2 / 90), int(3 * (left + right) / 2 / 110)))
    assert len(cells) == 9


@pytest.mark.parametrize("size", [(100, 100), (123, 68), (291, 57), (57, 291), (72, 179)])
def test_counted_objects_do_not_touch_and_stay_inside(size):
    rng = random.Random(5)
    for count in (1, 5):
        boxes = scenes.count_scene(rng, size, "blue", "ring", count).objects
        assert len(boxes) == count
        for number, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1] and right - left >= 10
            for other in boxes[:number]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_impossible_arguments_are_refused(capsys):
    for bad in (["--train-images", "3"], ["--text-only", "1"], ["--turns", "0"]):
        with pytest.raises(SystemExit):
            make_data.parse_arguments(["--out", "x", *bad])
    assert "at least" in capsys.readouterr().err
