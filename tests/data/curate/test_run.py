"""Whole runs: sums, equal bytes for any number of workers and after any interruption, resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from megatron_vl.config.dump import to_yaml
from megatron_vl.data.curate import run as run_module
from megatron_vl.data.curate.coordinates import to_pixels
from megatron_vl.data.curate.pool import Workers
from megatron_vl.data.curate.progress import Progress, format_seconds
from megatron_vl.data.curate.report import make_report, to_table
from megatron_vl.data.curate.rules import (
    ConceptBalance,
    Decontamination,
    Grounding,
    Mosaic,
    NearDuplicates,
    Source,
)
from megatron_vl.data.curate.run import curate
from megatron_vl.data.curate.state import plan_chunks
from megatron_vl.data.sample import parse_sample
from megatron_vl.errors import DataError
from tests.data.curate.made import (
    chat,
    config_for,
    output_bytes,
    pair,
    picture,
    read_jsonl,
    text,
    words,
    write_jsonl,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with 40 pairs, 12 conversations and 3 pages, with one of every problem planted."""
    root = tmp_path_factory.mktemp("made")
    for number in range(40):
        picture(number).save(root / f"{number}.png")
    for number in (3, 4):
        picture(number, (320, 240)).save(root / f"copy{number}.jpg", quality=80)
    Image.new("RGB", (50, 50), (9, 9, 9)).save(root / "flat.png")
    (root / "bench").mkdir()
    write_jsonl(
        root / "bench" / "b.jsonl", [{"question": text(90, 1000)}, {"question": "What is planted here?"}]
    )
    pairs = [
        pair(
            f"{number}.png",
            f"see <object:0> {text(6, number)}",
            f"p{number}",
            objects=[{"box": [10, 20, 70, 100]}],
        )
        for number in range(40)
    ]
    window = " ".join(words(90, 1000)[11:75])
    chats = [chat(text(12, 100 + number), text(20, 200 + number), f"c{number}") for number in range(7)]
    chats += [
        b"not json",
        chat("q", f"{text(30, 1)} {window} {text(5, 2)}", "ngram"),
        chat("what is\nPLANTED here", "x", "exact"),
        chat("q", " ".join(words(10, 3) * 30), "loop"),
        chat("q", "a", "flat", "flat.png"),
    ]
    picture(77).save(root / "page.png")
    page = [
        {"type": "image", "image": "page.png"},
        {"type": "image", "image": "gone.png"},
        {"type": "text", "text": "t"},
    ]
    chats += [{"id": "page", "content": page}]
    pairs += [pair("copy3.jpg", "copy", "copy3", objects=[]), pair("copy4.jpg", "copy", "copy4")]
    write_jsonl(root / "pairs.jsonl", pairs)
    write_jsonl(root / "chats.jsonl", chats)
    (root / "ids.txt").write_text("".join(f"p{number}\n" for number in range(40)) + "copy3\ncopy4\n")
    np.save(root / "clusters.npy", np.array([0] * 20 + [1] * 20 + [2, 2]))
    return root


def config_of(root: Path, output: str):
    config = config_for(
        root,
        [b"{}"],
        output,
        decontamination=Decontamination(enabled=True, benchmarks=str(root / "bench")),
        near_duplicates=NearDuplicates(enabled=True),
        concept_balance=ConceptBalance(
            True, ["pairs"], str(root / "ids.txt"), cluster_ids=str(root / "clusters.npy"), max_per_cluster=15
        ),
        grounding=Grounding(enabled=True),
        mosaic=Mosaic(enabled=True, probability=0.5, cell=64),
    )
    sources = [Source("chats", [str(root / "chats.jsonl")]), Source("pairs", [str(root / "pairs.jsonl")])]
    return replace(config, sources=sources, chunk_samples=5)


def silent(_: str) -> None:
    return None


@pytest.fixture(scope="module")
def whole(made):
    """The report and the bytes of an uninterrupted run in one process, kept as `whole`.

    All runs that are compared with it write to `out`, since the paths of mosaics stand in the data.
    """
    report = curate(config_of(made, "out"), workers=1, say=silent)
    shutil.move(made / "out", made / "whole")
    return report, output_bytes(made / "whole")


@pytest.fixture
def out(made, whole):
    """The empty place of the output."""
    yield made / "out"
    shutil.rmtree(made / "out", ignore_errors=True)


def test_every_sample_is_accounted_for(made, whole):
    report, _ = whole
    total = report["total"]
    assert total["read"] == 13 + 42
    assert total["dropped"] == {
        "cluster_cap": 10,
        "near_duplicate": 2,
        "broken_json": 1,
        "constant_image": 1,
        "exact_overlap": 1,
        "ngram_overlap": 1,
        "repeated_ngrams": 1,
    }
    assert total["kept"] + total["merged_into_mosaics"] + 17 == total["read"]
    assert total["merged_into_mosaics"] == 4 * total["mosaics_added"] > 0
    assert total["failed_images"] == {"missing": 1} == total["removed_images"]
    for name in ("read", "kept", "merged_into_mosaics", "mosaics_added"):
        assert sum(column[name] for column in report["sources"].values()) == total[name]
    assert set(total["dropped"]) | {"missing"} == set(report["reasons"])
    assert report["benchmark_items_with_most_hits"] == {"b.jsonl:1.question": 1, "b.jsonl:2.question": 1}


def test_dropped_samples_are_listed_with_place_and_reason(made, whole):
    dropped = {entry["id"]: entry for entry in read_jsonl(made / "whole" / "dropped.jsonl")}
    assert len(dropped) == 17 and set(dropped["ngram"]) == {"id", "source", "line", "reason", "detail"}
    assert (dropped["ngram"]["line"], dropped["ngram"]["source"]) == (9, str(made / "chats.jsonl"))
    assert dropped["chats.jsonl:8"]["reason"] == "broken_json"
    assert dropped["copy3"]["detail"].endswith("bits of p3")
    kept = [
        entry["id"]
        for name in ("pairs", "chats")
        for entry in read_jsonl(made / "whole/kept" / f"{name}.jsonl")
    ]
    members = [entry for name in kept if name.startswith("mosaic:") for entry in name[7:].split("+")]
    assert len({*kept, *members, *dropped}) == len(kept) + len(members) + len(dropped)
    everything = {*members, *dropped, *(name for name in kept if not name.startswith("mosaic:"))}
    assert len(everything) == 55
    (removed,) = read_jsonl(made / "whole" / "removed_images.jsonl")
    assert (removed["id"], removed["image"], removed["reason"]) == ("page", "gone.png", "missing")


def test_kept_lines_are_samples_and_untouched_ones_are_as_they_were(made, whole):
    before = (made / "chats.jsonl").read_bytes().splitlines()
    after = (made / "whole/kept/chats.jsonl").read_bytes().splitlines()
    assert after[:7] == before[:7]
    for name in ("chats", "pairs"):
        for line in (made / "whole/kept" / f"{name}.jsonl").read_bytes().splitlines():
            sample = parse_sample(line, "x")
            for image in sample.images:
                assert (made / image.path.replace("out/mosaic", "whole/mosaic")).is_file()


def test_boxes_of_a_mosaic_lie_on_their_pictures(made, whole):
    mosaics = [entry for entry in read_jsonl(made / "whole/kept/pairs.jsonl") if "made_from" in entry]
    assert mosaics
    for entry in mosaics:
        canvas = Image.open(made / entry["content"][0]["image"].replace("out/", "whole/"))
        assert canvas.size == (128, 128) and len(entry["objects"]) == 4
        for number, item in enumerate(entry["objects"]):
            x1, y1, x2, y2 = to_pixels(item["box"], "0-1000", canvas.size)
            left, top = number % 2 * 64, number // 2 * 64 + 8  # 160x120 becomes 64x48, 8 pixels down
            expected = [left + 4, top + 8, left + 28, top + 40]
            assert np.abs(np.array([x1, y1, x2, y2]) - expected).max() <= 0.07
            assert json.dumps(item["box"]) in entry["content"][1]["text"]
        assert "<object:" not in entry["content"][1]["text"]


def test_any_number_of_workers_gives_the_same_bytes(made, whole, out):
    curate(config_of(made, "out"), workers=2, say=silent)
    assert output_bytes(out) == whole[1]


def test_the_size_of_chunks_changes_nothing(made, whole, out):
    curate(replace(config_of(made, "out"), chunk_samples=100), say=silent)
    assert output_bytes(out) == whole[1]


@pytest.mark.parametrize("function", ["_examine_chunk", "_write_chunk"])
def test_a_run_that_fails_in_the_middle_continues(made, whole, out, monkeypatch, function):
    """The fourth chunk of either pass fails; the second start does the rest and nothing twice."""
    done: list[int] = []
    original = getattr(run_module, function)

    def failing(task):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(task.chunk.number)
        return original(task)

    config = config_of(made, "out")
    monkeypatch.setattr(run_module, function, failing)
    with pytest.raises(KeyboardInterrupt):
        curate(config, say=silent)
    assert not (Path(config.output) / "report.json").exists()
    first = list(done)

    def counting(task):
        done.append(task.chunk.number)
        return original(task)

    monkeypatch.setattr(run_module, function, counting)
    report = curate(config, say=silent)
    assert len(first) == 4 and sorted(done) == sorted(set(done))
    assert report == whole[0] and output_bytes(out) == whole[1]


# Hands out a chunk every fifth of a second, so that a kill always comes in the middle.
SLOW_START = """
import sys, time
from megatron_vl.data.curate import run
from megatron_vl.data.curate.settings import load_curation
read_lines = run.read_lines
run.read_lines = lambda *chunk: (time.sleep(0.2), read_lines(*chunk))[1]
run.curate(load_curation(sys.argv[1]), workers=2)
"""


def test_a_killed_process_leaves_work_that_is_continued(made, whole, out):
    """SIGKILL of a run with two workers, in the middle; the workers end too, and the bytes are the same."""
    config = made / "killed.yaml"
    config.write_text(to_yaml(replace(config_of(made, "out"), chunk_samples=2)))
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), str(config), "--workers", "2"]
    slow = [sys.executable, "-c", SLOW_START, str(config)]
    process = subprocess.Popen(slow, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    examined = out / "state/examined"
    deadline = time.monotonic() + 120
    while len(list(examined.glob("*.outcomes"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert workers and not alive
    assert not (out / "report.json").exists(), "it was too quick to be killed in the middle"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert output_bytes(out) == whole[1]


def test_a_finished_run_is_not_done_again(made, whole, monkeypatch):
    monkeypatch.setattr(run_module, "_examine_chunk", None)
    assert curate(config_of(made, "whole"), say=silent) == whole[0]


def test_other_rules_or_data_are_refused_and_restart_begins_anew(tmp_path):
    config = config_for(tmp_path, [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}])
    curate(config, say=silent)
    other = replace(config, near_duplicates=NearDuplicates(enabled=True))
    with pytest.raises(DataError, match="rules.near_duplicates"):
        curate(other, say=silent)
    write_jsonl(tmp_path / "web.jsonl", [{"id": "a", "text": "one"}])
    with pytest.raises(DataError, match="other data"):
        curate(config, say=silent)
    assert curate(config, restart=True, say=silent)["total"]["read"] == 1
    (tmp_path / "out/state/run.json").unlink()
    with pytest.raises(DataError, match="holds report.json, dropped.jsonl, .* but no state"):
        curate(config, say=silent)


def test_restart_removes_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "out" / "kept").mkdir(parents=True)
    (tmp_path / "out" / "kept" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="holds kept, but no state"):
        curate(config_for(tmp_path, [{"text": "one"}]), restart=True, say=silent)
    assert (tmp_path / "out/kept/mine.txt").read_text() == "precious"


def test_two_runs_do_not_share_an_output(tmp_path):
    config = config_for(tmp_path, [{"text": "one"}])
    held = run_module.State(config.output)
    with pytest.raises(DataError, match="at work there"):
        curate(config, say=silent)
    held.close()
    assert curate(config, say=silent)["total"]["kept"] == 1


def test_a_dying_worker_is_named_as_such(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="a worker process died"), Workers(2, silent, ("",)) as workers:
        list(workers.run(os._exit, [3, 4]))


def test_sums_that_do_not_agree_end_a_run(tmp_path):
    from collections import Counter

    config = config_for(tmp_path, [{"text": "one"}])
    good = {"web": {"samples": Counter(read=3, kept=2, dropped=1), "dropped": Counter(qr_code=1)}}
    assert "qr_code" in to_table(make_report(config, good, {}, {}))
    bad = {"web": {"samples": Counter(read=3, kept=2)}}
    with pytest.raises(AssertionError, match="3 samples read, 2 accounted for"):
        make_report(config, bad, {}, {})


def test_rules_that_are_off_are_reported(tmp_path):
    report = curate(config_for(tmp_path, [{"text": "one"}]), say=silent)
    assert "qr_codes" in report["rules_off"] and "qr_codes" in to_table(report)


def test_chunks_do_not_cross_sources():
    chunks = plan_chunks([5, 2, 0, 4], 3)
    assert [(chunk.source, chunk.first, chunk.first_in_source, chunk.count) for chunk in chunks] == [
        (0, 0, 0, 3),
        (0, 3, 3, 2),
        (1, 5, 0, 2),
        (3, 7, 0, 3),
        (3, 10, 3, 1),
    ]


def test_progress_leaves_earlier_work_out_of_the_speed(capsys):
    now = [0.0]
    progress = Progress("rules", 1000, done=500, every=5, clock=lambda: now[0])
    now[0] = 1
    progress.add(100)
    now[0] = 10
    progress.add(100)
    assert capsys.readouterr().err == "rules: 700 of 1,000 samples (70%), 20/s, 0:00:15 left\n"
    assert format_seconds(3725) == "1:02:05"
