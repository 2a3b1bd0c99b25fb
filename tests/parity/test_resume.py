"""tools/check_resume.py: representative pairs of layouts, the whole matrix marked slow, and that it finds faults."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vl.parity.resume import BEFORE, PAIRS, Matrix, end, largest, samples_by_step
from tests.parity import resume_faults

ROOT = Path(__file__).parents[2]

QUICK = (
    ("1", "tp2pp2cp2sp"),
    ("tp2pp2/all", "dp2"),
    ("dp2tp2", "pp4/all"),
    ("dp2tp2pp2/tensor", "dp2cp2tp2sp"),
    ("dp4/plain", "dp2tp2"),
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_resume", ROOT / "tools" / "check_resume.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def matrix(world, tool, tmp_path_factory) -> Matrix:
    folder = tmp_path_factory.mktemp("resume")
    keys = tool.draw_data(folder / "data")
    return Matrix(world, tool.CONFIG, folder, (*tool.OVERRIDES, *keys))


def assert_ok(row) -> None:
    assert (row.status, row.rule) == ("ok", ""), row
    assert 0 <= row.loss <= 1e-5 and 0 <= row.grad_norm <= 1e-5 and row.lr_equal and row.samples_equal


@pytest.mark.parametrize(("first", "second"), QUICK)
def test_a_run_goes_on_in_another_layout(matrix, first, second):
    assert_ok(matrix.compare(first, second))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if pair not in QUICK])
def test_every_pair_of_the_matrix(matrix, first, second):
    assert_ok(matrix.compare(first, second))


def test_the_matrix_changes_every_axis_both_ways():
    assert len(PAIRS) >= 14 and set(QUICK) <= set(PAIRS)
    for part in ("tp", "pp", "vpp", "cp", "dp", "sp", "/tensor", "/all", "/plain"):
        sides = [(part in first, part in second) for first, second in PAIRS]
        assert (True, False) in sides and (False, True) in sides, part
    assert end("dp2cp2tp2sp/tensor").ranks == 8


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (resume_faults.lost_step, "loss"),
        (resume_faults.lost_first_moment, "loss"),
        (resume_faults.lost_second_moment_of_the_last_weight, "loss"),
        (resume_faults.shifted_samples, "samples"),
        (resume_faults.swapped_gate_and_up, "loss"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_resume_may_lose_is_found(matrix, fault, where):
    row = matrix.compare("1", "dp2", fault)
    assert row.status == "failed"
    assert (row.samples_equal is False) if where == "samples" else row.loss > 1e-5


def test_comparison():
    steps = [{"loss": 2.0}, {"loss": 4.0}], [{"loss": 2.0}, {"loss": 4.004}]
    assert largest(*steps, "loss") == pytest.approx(1e-3)
    assert math.isclose(largest(steps[0], steps[0], "loss"), 0)
    seen = [[["a", "b"], ["c"]], [["a", "b"], ["d"]]]
    assert samples_by_step(seen) == [["a", "b"], ["c", "d"]]


def test_the_tool_reports_and_refuses(tool, tmp_path):
    assert tool.parse_pairs("tp2:pp2,dp4/plain:1") == [("tp2", "pp2"), ("dp4/plain", "1")]
    for wrong, why in (("tp2", "not FIRST:SECOND"), ("tp2:zp3", "'zp3'")):
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "check_resume.py"), "--pairs", wrong],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and why in done.stderr
    assert BEFORE == 4


def test_packed_rows_of_a_mixture_go_on_in_another_layout(world, tool, tmp_path):
    """The plan of rows does not depend on the layout: same documents in every step, same curve."""
    keys = tool.draw_data(tmp_path / "data")
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "text.jsonl").write_text("".join(line for line in lines if "images/" not in line))
    domains = (
        f"{{name: all, paths: [{tmp_path}/data/train.jsonl], weight: 2}}, "
        f"{{name: text, paths: [{tmp_path}/data/text.jsonl], weight: 1, modality: text}}"
    )
    packing = "data.packing={enabled: true, pad_multiple: 16, look_ahead_rows: 16, index_workers: 0}"
    packed = (
        *tool.OVERRIDES, *keys, "data.train=[]", f"data.domains=[{domains}]", packing, "data.seq_length=160",
    )  # fmt: skip
    matrix = Matrix(world, tool.CONFIG, tmp_path, packed)
    row = matrix.compare("dp2cp2", "dp4tp2sp")
    assert_ok(row)
    plan = json.loads((tmp_path / "dp2cp2" / "data_plan.json").read_text())
    assert plan["steps"] == 9 and plan["phases"][0]["efficiency"] > 0.8
    assert [d["name"] for d in plan["phases"][0]["domains"]] == ["all", "text"]
