"""The table of `tools/gpu_check.sh`: every line is there, met, missed, or with the reason why it has no number."""

import json
import subprocess
from pathlib import Path

from tools.gpu_summary import LINES, judged, main, read_parts

ROOT = Path(__file__).parents[2]


def projector_rows(ours: float | None) -> list[dict]:
    rows = []
    for views in (1, 8, 64):
        for grid in ("52x52", "36x36"):
            about = {"operation": "projector", "shape": f"{views} x {grid}"}
            rows += [
                about | {"way": w, "both_seconds": s}
                for w, s in (("stock (channels first)", 3.0), ("channels last", 2.0))
            ]
            own = (
                {"missing": "there is no library"}
                if ours is None
                else {"both_seconds": ours, "of_gemm": 0.75}
            )
            rows.append(about | {"way": "ours"} | own)
    return rows


def records(ours: float | None = 1.5) -> dict:
    packed = [
        {"operation": "packed_attention", "way": w, "both_seconds": s}
        for w, s in (("ours", 1.0), ("documents apart", 1.2))
    ]
    steps = {
        f"fp8_{p}_{n}": {"step_seconds": {"median": 1 + n * t}}
        for p, t in (("none", 0.3), ("tensorwise", 0.2))
        for n in (2, 8)
    }
    tower = {
        "rows": [
            {"way": "ours", "of_gemm": 0.7, "of_best_plain": 1.2},
            {"way": "plain", "of_gemm": 0.1, "of_best_plain": 1},
        ]
    }
    return {"kernels": {"rows": projector_rows(ours) + packed}, "tower": tower, "text": {"mfu": 0.4}, **steps}


def test_lines():
    lines = {line["line"]: line for line in judged(records())}
    assert len(lines) == len(LINES)
    assert lines["projector, stock / ours"]["measured"] == 2.0 and lines["projector, stock / ours"]["met"]
    assert abs(lines["decoder layer, bf16 / FP8"]["measured"] - 1.5) < 1e-9
    assert lines["text only 8k, MFU"]["measured"] == 0.4 and not lines["text only 8k, MFU"]["met"]
    missing = lines["image mixture, MFU with the tower"]
    assert not missing["met"] and missing["measured"] is None and "mixture" in missing["why"]
    assert lines["tower, share of GEMM"]["met"]


def test_a_kernel_that_is_not_there_is_not_met_and_says_why():
    lines = {line["line"]: line for line in judged(records(None))}
    assert lines["projector, stock / ours"]["why"] == "not measured: there is no library"
    assert not lines["projector, share of GEMM at 64 views"]["met"]


def test_failed_parts_are_told(tmp_path, capsys):
    (tmp_path / "parts.tsv").write_text("build\t2\t1\t120\npytest\t124\t300\t300\ntext\t0\t60\t120\n")
    (tmp_path / "build.log").write_text("make: no rule\n")
    (tmp_path / "text.json").write_text(
        json.dumps({"mfu": 0.6, "step_seconds": {"median": 1.0}, "memory_bytes": 1})
    )
    assert [part["why"] for part in read_parts(tmp_path)] == [
        "make: no rule",
        "ran past its limit of 300 s",
        "",
    ]
    assert main([str(tmp_path), str(tmp_path / "out.json")]) == 1
    text = capsys.readouterr().out
    assert "FAILED  build" in text and "NOT MET" in text and "met      text only 8k" in text
    assert len(json.loads((tmp_path / "out.json").read_text())["lines"]) == len(LINES)


def test_the_script_is_a_script_and_refuses_what_it_does_not_know(tmp_path):
    script = str(ROOT / "tools/gpu_check.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run(
        [script, "everything"],
        env={"PATH": "/usr/bin:/bin", "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "no part everything" in done.stderr
