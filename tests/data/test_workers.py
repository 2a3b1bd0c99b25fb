"""Workers of a pool end with their parent, however it dies."""

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_vl.data import lengths_build
from megatron_vl.data.curate import pool
from megatron_vl.data.jsonl import JsonlSource
from tests.data.tiny import MODEL, chat, make_data, write_jsonl

ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_of_an_index_end_when_their_parent_leaves_without_a_word(tmp_path):
    files = [str(tmp_path / name) for name in ("a", "b")]
    for file in files:
        Path(file).touch()
    command = [sys.executable, "-m", "tests.data.orphans", str(tmp_path), *files]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == 3
    workers = [int(path.suffix[1:]) for path in tmp_path.glob("worker.*")]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, 9)
    assert left == []


def test_the_other_pools_ask_for_the_same(tmp_path, monkeypatch):
    """Their initializers, which run in every worker."""
    asked = []
    data = make_data(tmp_path)
    source = JsonlSource([write_jsonl(tmp_path / "a.jsonl", [chat()])])
    monkeypatch.setattr(lengths_build, "end_with_parent", lambda: asked.append("lengths"))
    monkeypatch.setattr(pool, "end_with_parent", lambda: asked.append("curation"))
    monkeypatch.setattr(pool.signal, "signal", lambda *a: None)
    lengths_build._start_worker(source, data, MODEL)
    pool._start(lambda: asked.append("begun"), ())
    assert asked == ["lengths", "curation", "begun"]
