"""tools/inspect_data.py against every field of the golden files, and on unusable input."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import features

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "tools" / "inspect_data.py"
GOLDEN = ROOT / "tests" / "golden" / "preprocess"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
FILES = sorted({case["file"] for case in EXPECTED["cases"]})


@pytest.fixture(scope="module")
def inspect_data():
    spec = importlib.util.spec_from_file_location("inspect_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, cwd: Path = ROOT) -> tuple[int, list[dict]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--json"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def assert_equal(record: dict, case: dict) -> None:
    """Every golden field: exact, but for statistics. The hash of float pixels depends on the machine."""
    hashes_hold = (
        case["format"] != "JPEG"
        or features.version("libjpeg_turbo") == EXPECTED["made_with"]["libjpeg_turbo"]
    )
    for field in set(case) - {"id", "npz"}:
        if field.endswith("_stats"):
            pairs = (
                zip(record[field], case[field], strict=True)
                if field == "crop_stats"
                else [(record[field], case[field])]
            )
            for ours, golden in pairs:
                for name in ("mean", "std", "min", "max"):
                    assert np.allclose(ours[name], golden[name], rtol=0, atol=1e-5 if hashes_hold else 0.2), (
                        field
                    )
        elif not field.endswith("_sha256") or field == "ids_sha256" or hashes_hold:
            assert record[field] == case[field] and type(record[field]) is type(case[field]), field


def test_golden_images_as_released():
    code, records = run("image", *FILES, cwd=GOLDEN)
    assert code == 0 and [record["file"] for record in records] == FILES
    cases = {
        case["file"]: case
        for case in EXPECTED["cases"]
        if case["rule"] == "le728" and case["alpha"] != "drop"
    }
    assert len(cases) == 16
    for record in records:
        assert_equal(record, cases[record["file"]])


@pytest.mark.parametrize(
    "options, wanted",
    [
        (["--alpha", "drop"], [case for case in EXPECTED["cases"] if case["alpha"] == "drop"]),
        (["--boundary-rule", "lt"], [case for case in EXPECTED["cases"] if case["rule"] == "lt728"]),
    ],
    ids=["drop", "lt"],
)
def test_golden_images_by_the_other_rules(inspect_data, capsys, options, wanted):
    assert len(wanted) == 2
    for case in wanted:
        assert inspect_data.main(["image", str(GOLDEN / case["file"]), "--json", *options]) == 0
        (record,) = json.loads(capsys.readouterr().out)
        assert_equal(record | {"file": case["file"]}, case)


@pytest.mark.parametrize("rule", ["le", "lt"])
def test_golden_sizes(rule):
    golden = json.loads((GOLDEN / "sizes.json").read_text())
    code, records = run(
        "sizes", *("x".join(map(str, row["size"])) for row in golden["rows"]), "--boundary-rule", rule
    )
    assert code == 0 and len(records) == 400
    for record, row in zip(records, golden["rows"], strict=True):
        values = row.get(rule + "728", row["le728"])
        assert record["size"] == row["size"] and record["rule"] == record["rule"] == rule + "728"
        assert [record[column] for column in golden["columns"]] == record[rule + "728"] == values


def test_sizes_need_no_torch():
    code = "import runpy, sys; sys.argv = ['', 'sizes', '64x64']"
    code += f"\ntry: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    code += "\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
    )


def test_bad_images_are_listed_and_the_others_shown(inspect_data, capsys, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    good = str(GOLDEN / "images" / "a11_strip_100x20.png")
    assert inspect_data.main(["image", str(text), good, str(tmp_path / "missing.png"), "--json"]) == 1
    bad, shown, missing = json.loads(capsys.readouterr().out)
    assert bad["error"]["reason"] == "unsupported_format" and bad["file"] == str(text)
    assert missing["error"]["reason"] == "missing" and missing["error"]["detail"]
    assert shown["num_tokens"] == 171


def test_bad_sizes_are_listed(inspect_data, capsys):
    assert inspect_data.main(["sizes", "0x5", "wide", "64x64", "200000x32", "--json"]) == 1
    records = json.loads(capsys.readouterr().out)
    assert [record.get("error", {}).get("reason") for record in records] == [
        "zero_size",
        "bad_size",
        None,
        "too_thin",
    ]


def test_tensors_of_one_image_and_of_several(inspect_data, capsys, tmp_path):
    files = [str(GOLDEN / "images" / name) for name in ("a08_wide_1000x300.jpg", "a11_strip_100x20.png")]
    one, several = tmp_path / "one.npz", tmp_path / "several.npz"
    assert inspect_data.main(["image", files[0], "--tensors", str(one)]) == 0
    assert inspect_data.main(["image", *files, "--tensors", str(several)]) == 0
    capsys.readouterr()
    views, both = np.load(one), np.load(several)
    assert sorted(views) == ["crops", "global"]
    assert sorted(both) == ["0.crops", "0.global", "1.crops", "1.global"]
    assert views["global"].shape == (3, 728, 728) and views["crops"].shape == (2, 3, 504, 504)
    assert both["1.crops"].shape == (0, 3, 504, 504) and views["crops"].dtype == np.float32
    assert np.array_equal(both["0.crops"], views["crops"])
    golden = np.load(GOLDEN / "npz" / "a08_wide_1000x300.npz")
    assert np.abs(views["crops"][..., ::7, ::7] - golden["crops"].astype(np.float32)).max() < 1.2e-3


def test_tensors_that_cannot_be_written(inspect_data, capsys, tmp_path):
    image = str(GOLDEN / "images" / "a11_strip_100x20.png")
    assert inspect_data.main(["image", image, "--tensors", str(tmp_path / "no" / "out.npz")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_tables(inspect_data, capsys, tmp_path):
    image = str(GOLDEN / "images" / "a16_palette_300x480.png")
    assert inspect_data.main(["image", image, str(tmp_path / "missing.png")]) == 1
    header, row, refused = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "file" and row.split()[-1] == "338" and "refused (missing)" in refused
    assert inspect_data.main(["sizes", "1920x1080"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "1920x1080",
        "1920",
        "1080",
        "504",
        "2016",
        "1008",
        "4",
        "2",
        "836",
    ]


def test_view_sizes_of_another_model(inspect_data, capsys, tmp_path):
    vision = {"image_size": 112, "patch_size": 14}
    config = {"vision_config": vision, "patch_token_len": 1, "image_token_len": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect_data.main(["sizes", "640x480", "112x112", "--hf", str(tmp_path), "--json"]) == 0
    large, small = json.loads(capsys.readouterr().out)
    assert (large["rule"], large["window"], large["tokens"]) == ("le112", 56, 30 * 3 + 4 + 6)
    assert small["tokens"] == 6
    assert inspect_data.main(["sizes", "640x480", "--hf", str(tmp_path / "nothing")]) == 2
    assert "config.json" in capsys.readouterr().err
