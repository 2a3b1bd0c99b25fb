"""Signs of life: what is written when, what counts as a hang, and who is named for it."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_vl.parallel import heartbeat as module
from megatron_vl.parallel.beats import Beat, Seen, beat_path, forget, last_seen, read_beats, suspects
from megatron_vl.parallel.heartbeat import Heartbeat, Phase
from megatron_vl.plan.layout import Layout

LAYOUT = Layout(tp=2, pp=2)
ROOT = Path(__file__).parents[2]


def wait_until(done, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read(folder: Path, rank: int) -> dict:
    return json.loads(beat_path(folder, rank).read_text())


def test_a_change_of_phase_is_written_at_once_and_the_end_too(tmp_path):
    phase, folder = Phase(), tmp_path / "run" / "ranks"
    with Heartbeat(folder, LAYOUT, 3, phase, 60.0) as heartbeat:
        wait_until(lambda: beat_path(folder, 3).exists())
        phase.enter("training", 7)
        begin = time.monotonic()
        wait_until(lambda: read(folder, 3)["phase"] == "training")
        assert time.monotonic() - begin < 1.0, "it waited for the next round"
        beat = read(folder, 3)
        assert (beat["rank"], beat["coords"], beat["step"], beat["state"]) == (
            3,
            "dp0 pp1 cp0 tp1",
            7,
            "running",
        )
        assert (beat["pid"], beat["host"]) == (os.getpid(), socket.gethostname())
        assert "test_heartbeat.py:" in beat["frame"] and not beat["waiting"]
        assert heartbeat.name == "rank 3 (dp0 pp1 cp0 tp1)"
    assert read(folder, 3)["state"] == "ended"
    assert [p.name for p in folder.iterdir()] == ["rank_00003.json"]


@pytest.mark.parametrize(("error", "state"), [(ValueError, "failed"), (SystemExit, "ended")])
def test_the_last_state_tells_how_it_ended(tmp_path, error, state):
    with pytest.raises(error), Heartbeat(tmp_path, LAYOUT, 0, Phase(), 60.0):
        raise error
    assert read(tmp_path, 0)["state"] == state


def test_a_disk_that_takes_nothing_is_said_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "ranks").write_text("a file where the folder should be")
    phase = Phase()
    with Heartbeat(tmp_path / "ranks", LAYOUT, 0, phase, 60.0):
        for step in range(5):
            phase.enter("training", step)
            time.sleep(0.05)
    said = capsys.readouterr().err
    assert said.count("no heartbeat can be written") == 1
    assert said.startswith("rank 0 (dp0 pp0 cp0 tp0): ") and "training goes on" in said


class Hung(Exception):
    """Instead of the end of the process."""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A heartbeat without its thread, and a clock to set."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    heartbeat = Heartbeat(tmp_path, LAYOUT, 0, Phase(), slow=100.0)

    def hung(limit: float) -> None:
        raise Hung

    monkeypatch.setattr(heartbeat, "_hung", hung)

    def look_until(end: float) -> float:
        """When it gives up, or ``end``."""
        while now[0] < end:
            now[0] += module.INTERVAL
            try:
                heartbeat._look()
            except Hung:
                return now[0]
        return end

    return heartbeat, look_until, now


def test_a_phase_without_progress_hangs_and_ticks_are_progress(watched):
    heartbeat, look_until, _ = watched
    heartbeat.phase.enter("training", 1, limit=10.0)
    assert look_until(9) == 9 or look_until(10)
    for _ in range(20):  # an evaluation of many batches
        heartbeat.phase.tick()
        heartbeat._look()
        assert look_until(watched[2][0] + 8) == watched[2][0]
    begin = watched[2][0]
    assert 2 < look_until(begin + 100) - begin <= 14


def test_phases_without_a_limit_get_the_long_one(watched):
    heartbeat, look_until, _ = watched
    heartbeat.phase.enter("building the model")
    assert 100 < look_until(500) <= 106


def test_a_rank_in_a_collective_leaves_it_to_the_collective_to_time_out_first(watched, monkeypatch):
    heartbeat, look_until, _ = watched
    monkeypatch.setattr(module, "waits", lambda frame: True)
    heartbeat.phase.enter("training", 1, limit=20.0)
    assert 27 < look_until(500) <= 32


def test_a_suspended_process_has_not_hung(watched):
    heartbeat, look_until, now = watched
    heartbeat.phase.enter("training", 1, limit=10.0)
    heartbeat._look()
    now[0] += 3600.0  # scontrol suspend, a closed lid
    heartbeat._look()
    assert heartbeat.idle == 2 * module.INTERVAL


def test_a_hang_ends_the_process_with_its_place_and_code_124(tmp_path):
    program = f"""
import time
from pathlib import Path
from megatron_vl.parallel.heartbeat import Heartbeat, Phase
from megatron_vl.plan.layout import Layout
def stuck_in_here():
    time.sleep(600)
phase = Phase()
with Heartbeat(Path({str(tmp_path)!r}), Layout(), 0, phase, 60.0):
    phase.enter("training", 7, limit=1.0)
    stuck_in_here()
"""
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 124, ended.stderr
    assert time.monotonic() - begin < 20
    first, second, *rest = ended.stderr.splitlines()
    assert first.startswith("rank 0 (dp0 pp0 cp0 tp0) has made no progress for ")
    assert first.endswith(" while training at step 7 (limit 1 s)")
    assert second.startswith("rank 0 (dp0 pp0 cp0 tp0) is not in a collective while training at step 7: for ")
    assert "in stuck_in_here" in "\n".join(rest)
    assert read(tmp_path, 0)["state"] == "hung"


BEAT = Beat(
    rank=0, coords="", phase="training", step=7, idle=20.0, frame="distributed/distributed_c10d.py:1 wait",
    waiting=True, state="running", pid=os.getpid(), host="elsewhere", time=0.0,
)  # fmt: skip


def everyone(**changes: Seen) -> dict[int, Seen]:
    """Four ranks in a collective, but for ``r2=...``."""
    return {rank: changes.get(f"r{rank}", Seen(replace(BEAT, rank=rank), 0.5)) for rank in range(4)}


def test_nobody_is_suspected_when_all_wait():
    assert suspects(LAYOUT, everyone()) == []


def test_who_is_suspected():
    asleep = replace(BEAT, frame="train/step.py:5 nap", waiting=False)
    (line,) = suspects(LAYOUT, everyone(r2=Seen(asleep, 1.0)))
    assert line == (
        "rank 2 (dp0 pp1 cp0 tp0) is not in a collective while training at step 7: for 20 s in train/step.py:5 nap"
    )
    assert suspects(LAYOUT, everyone(r2=Seen(asleep, 1.0)), hung=False) == [], "it may just be computing"
    silent = Seen(replace(BEAT, phase="loading data", step=8), 31.0)
    (line,) = suspects(LAYOUT, everyone(r1=silent, r2=Seen(asleep, 1.0)))
    assert line.startswith(
        "rank 1 (dp0 pp0 cp0 tp1) has given no sign of life for 31 s (stopped, or its node is gone)"
    )
    assert "it was last seen while loading data at step 8" in line
    failed = Seen(replace(BEAT, state="failed"), 40.0)
    assert suspects(LAYOUT, everyone(r3=failed, r1=silent)) == [
        "rank 3 (dp0 pp1 cp0 tp1) failed while training at step 7"
    ]
    lost = Seen(replace(BEAT, state="lost", waiting=False), 40.0)
    assert suspects(LAYOUT, everyone(r3=lost)) == [], "it is a victim"
    absent = everyone(r2=Seen(asleep, 1.0))
    del absent[0]
    assert suspects(LAYOUT, absent) == ["rank 0 (dp0 pp0 cp0 tp0) has not reported since the run was started"]


def test_a_process_of_this_machine_that_is_gone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = Seen(replace(BEAT, pid=child.pid, host=socket.gethostname()), 0.1)
    (line,) = suspects(LAYOUT, everyone(r1=dead))
    assert line.startswith("rank 1 (dp0 pp0 cp0 tp1) has died while training at step 7: process ")
    assert suspects(LAYOUT, everyone(r1=replace(dead, beat=replace(dead.beat, pid=os.getpid())))) == []


def test_a_crowd_is_cut_short():
    lines = suspects(Layout(dp=100), {})
    assert len(lines) == 9 and lines[-1] == "and 92 more ranks"


def test_files_of_an_earlier_start_and_damaged_ones_do_not_count(tmp_path):
    for rank, beat in ((0, replace(BEAT, time=100.0)), (1, replace(BEAT, time=90.0)), (2, BEAT)):
        beat_path(tmp_path, rank).write_text(json.dumps(asdict(beat)))
    beat_path(tmp_path, 2).write_text("half a li")
    beat_path(tmp_path, 3).write_text(json.dumps({"rank": 3}))
    os.utime(beat_path(tmp_path, 1), (50.0, 50.0))
    os.utime(beat_path(tmp_path, 0), (80.0, 80.0))
    assert {rank: seen.age for rank, seen in read_beats(tmp_path, 4, since=0.0).items()} == {0: 0.0, 1: 30.0}
    assert list(read_beats(tmp_path, 4, since=95.0)) == [0]
    assert last_seen(read_beats(tmp_path, 4, 0.0)[0]) == " while training at step 7" and last_seen(None) == ""
    forget(tmp_path)
    assert list(tmp_path.iterdir()) == []
    forget(tmp_path / "none yet")
