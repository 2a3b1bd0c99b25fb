"""tools/inspect_data.py against every field of the golden files, and on unusable input."""

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from tests.data.tiny import chat, make_data, write_jsonl

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


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    """A run over two small domains: conversations with images, and one line that is broken."""
    folder = tmp_path_factory.mktemp("run")
    make_data(folder)
    records = [chat("What colour?", "red", *[["wide.png"], []][n % 2], id=f"s{n}") for n in range(20)]
    write_jsonl(folder / "vqa.jsonl", [*records, b"{broken"])
    run = f"""
        preset: step3_vl_tiny
        run_dir: {folder}/run
        parallel: {{device: cpu}}
        data:
          data_root: {folder}
          tokenizer: {folder}/text.model
          seq_length: 128
          domains: [{{name: vqa, paths: [{folder}/vqa.jsonl], weight: 1}}]
          packing: {{enabled: true, pad_multiple: 8, look_ahead_rows: 8, index_workers: 0}}
        schedule: {{phases: [{{tokens: 5120, lr_start: 0.001, lr_end: 0.001}}]}}
        train: {{train_steps: 4, global_batch_size: 4}}
    """
    (folder / "run.yaml").write_text(textwrap.dedent(run))
    return folder / "run.yaml"


def test_a_sample_of_a_run_and_of_a_file(inspect_data, capsys, run_file, tmp_path):
    picture = tmp_path / "sample.png"
    assert inspect_data.main(["sample", str(run_file), "--index", "2", "--out", str(picture)]) == 0
    of_run = capsys.readouterr().out.splitlines()
    assert of_run[0].startswith("s2  (domain vqa") and "<im_start><im_patch>x4<im_end>" in "\n".join(of_run)
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width == 1400
    folder = run_file.parent
    keys = ["preset=step3_vl_tiny", f"data.tokenizer={folder}/text.model", f"data.data_root={folder}"]
    assert inspect_data.main(["sample", str(folder / "vqa.jsonl"), "--id", "s2", *keys]) == 0
    of_file = capsys.readouterr().out.splitlines()
    assert of_file[1:] == of_run[1:], "the same tokens, scored alike"
    assert inspect_data.main(["sample", str(run_file), "--index", "20"]) == 1
    assert "REFUSED broken_json" in capsys.readouterr().out
    assert not (folder / "run").exists(), "looking at a sample writes nothing"
    assert inspect_data.main(["sample", str(run_file), "--index", "21"]) == 2
    assert "domain vqa has 21 samples" in capsys.readouterr().err


def test_a_row_of_a_run(inspect_data, capsys, run_file, tmp_path):
    picture = tmp_path / "row.png"
    keys = ["parallel.context_parallel_size=2", "parallel.tensor_model_parallel_size=2"]
    command = ["row", str(run_file), "--step", "3", "--row", "1", "--world-size", "8", *keys]
    assert inspect_data.main([*command, "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "step 3, row 1 of 4: data-parallel rank " in text and "layout TP2 CP2 DP2 PP1" in text
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert inspect_data.main(["row", str(run_file), "--row", "4"]) == 2
    assert "row 4: the run has steps 0 to 3 of rows 0 to 3" in capsys.readouterr().err
    assert (
        inspect_data.main(["row", str(run_file), "parallel.context_parallel_size=3", "--world-size", "4"])
        == 2
    )
    assert "context_parallel_size" in capsys.readouterr().err
    assert inspect_data.main(["row", str(run_file), "--out", str(tmp_path / "no" / "a.png")]) == 2
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inspect_data.main(["row", str(run_file), "--step", "1", "seed"])


def test_a_survey_counts_by_source(inspect_data, capsys, run_file):
    path = str(run_file.parent / "vqa.jsonl")
    assert inspect_data.main(["survey", path]) == 1
    said = "20 samples, 10 images, 0 tokens given as ids; refused 1: broken_json 1"
    assert capsys.readouterr().out == f"{path}: {said}\n"
    assert inspect_data.main(["survey", path, "--format", "jsonl", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[path]["refused"] == {"broken_json": 1}
    assert inspect_data.main(["survey", path + ".none"]) == 2
