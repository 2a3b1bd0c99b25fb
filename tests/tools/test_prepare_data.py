"""tools/prepare_data.py as a command: output files, table, errors, exit codes, and the example of the docs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_vl.data.curate.rules import CurationConfig
from megatron_vl.data.curate.settings import load_curation
from tests.data.curate.made import chat, pair, picture, read_jsonl, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "prepare_data.py"
EXAMPLE = ROOT / "examples" / "curate" / "curate.yaml"


@pytest.fixture(scope="module")
def prepare_data():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path):
    """The data that the example names, below its working folder."""
    data = tmp_path / "data"
    (data / "benchmarks").mkdir(parents=True)
    for number in range(6):
        picture(number).save(data / f"{number}.png")
    picture(2, (480, 360)).save(data / "again.jpg")
    records = [pair(f"{number}.png", f"caption {number}", f"p{number}") for number in range(6)]
    write_jsonl(
        data / "pairs.jsonl", [*records, pair("again.jpg", "c", "again"), pair("../x.png", "c", "out")]
    )
    write_jsonl(data / "chats.jsonl", [chat("hello", "there", "c0"), chat("Which city?", "a", "c1"), b"{"])
    write_jsonl(data / "benchmarks" / "b.jsonl", [{"question": "which  CITY"}])
    return tmp_path


def test_the_example_from_start_to_end(folder):
    done = run(str(EXAMPLE), cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "data/curated/report.json").read_text())
    assert report["total"]["read"] == 11
    assert report["total"]["dropped"] == {
        "broken_json": 1,
        "exact_overlap": 1,
        "failed_image": 1,
        "near_duplicate": 1,
    }
    assert {entry["id"] for entry in read_jsonl(folder / "data/curated/dropped.jsonl")} == {
        "p2",  # `again` is larger
        "out",
        "c1",
        "chats.jsonl:3",
    }
    assert re.search(r"total +dropped: near_duplicate +1 +9.09%", done.stdout)
    assert "rules that were off: qr_codes" in done.stdout and "left" in done.stderr
    again = run(str(EXAMPLE), cwd=folder)
    assert again.returncode == 0 and "this run is finished" in again.stderr and again.stdout == done.stdout


def test_check_prints_the_whole_description_and_does_nothing(folder, prepare_data, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert prepare_data.main([str(EXAMPLE), "--check", "near_duplicates.radius=2"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["near_duplicates"]["radius"] == 2
    assert not (folder / "data/curated").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["near_duplicates.raduis=2"], "did you mean near_duplicates.radius?"),
        (["data_root=nowhere"], "data_root = nowhere: is not a folder"),
        (["sources=[{name: pairs, files: [data/none.jsonl]}]"], "data/none.jsonl: is not a file"),
        (["decontamination.benchmarks=data/curated"], "must be a folder of benchmark files"),
        (["decontamination.fields=[answer]"], "no prompt found under the keys answer"),
    ],
)
def test_errors_are_sentences_not_tracebacks(folder, prepare_data, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    assert prepare_data.main([str(EXAMPLE), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(folder, prepare_data, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "data" / "curated").write_text("a file")
    assert prepare_data.main([str(EXAMPLE)]) == 2
    assert "data/curated" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(folder, prepare_data, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    monkeypatch.setattr(prepare_data, "curate", interrupted)
    assert prepare_data.main([str(EXAMPLE)]) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "-1", "many"])
def test_workers_must_be_a_number_of_processes(prepare_data, capsys, workers):
    with pytest.raises(SystemExit) as end:
        prepare_data.main([str(EXAMPLE), "--workers", workers])
    assert end.value.code == 2 and "--workers" in capsys.readouterr().err


def test_the_page_names_every_key_of_the_rules():
    page = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")
    config = CurationConfig("out", [])
    sections = [name for name, value in vars(config).items() if hasattr(value, "__dataclass_fields__")]
    missing = [name for name in sections if f"`{name}`" not in page]
    missing += [
        f"{name}.{key}"
        for name in sections
        for key in vars(getattr(config, name))
        if key not in ("enabled", "seed", "sources") and f"`{key}" not in page
    ]
    assert missing == []


def test_the_example_loads(folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = load_curation(os.fspath(EXAMPLE))
    assert config.decontamination.enabled and config.near_duplicates.enabled
