"""Parity with the golden model in a representative set of layouts; the whole matrix is marked slow."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.errors import CheckpointError, ConfigError
from megatron_vl.parity.check import Row, judge_steps, trajectory
from megatron_vl.parity.layouts import ALL, parse_layout
from megatron_vl.parity.reference import arrange, documents, read_reference
from megatron_vl.plan.layout import Layout
from tests.fixtures.paths import TINY_A
from tests.parity.checking import check, setting_of

REPRESENTATIVE = (
    ("1", "data", "dense"),
    ("tp2sp", "tensor", "dense"),
    ("tp4sp", "data", "packed"),
    ("pp4", "data", "packed"),
    ("pp2vpp2", "data", "dense"),
    ("cp2", "data", "packed"),
    ("cp4", "tensor", "dense"),
    ("dp2tp2pp2", "tensor", "packed"),
    ("tp2pp2cp2sp", "data", "dense"),
    ("tp2pp2cp2sp", "tensor", "packed"),
    ("dp2cp2tp2sp", "data", "packed"),
    ("1", "all", "packed"),
    ("pp4", "all", "dense"),
    ("pp2vpp2", "all", "packed"),
    ("tp2pp2cp2sp", "all", "dense"),
    ("dp2tp2pp2", "all", "packed"),
)


@pytest.fixture(scope="module")
def tiny_a():
    return setting_of(TINY_A)


@pytest.mark.parametrize(("layout", "placement", "form"), REPRESENTATIVE)
def test_layout_equals_the_reference(world, tiny_a, layout, placement, form):
    row = check(world, tiny_a, layout, placement, form)
    assert (row.status, row.rule) == ("ok", "")
    assert row.loss_rel < 2e-6 and row.logits_rel < 2e-5 and 0 < row.worst_grad < 5e-5 and row.worst_name


def test_bf16_stays_within_its_tolerances(world):
    row = check(world, setting_of(TINY_A, "--dtype", "bf16"), "tp2pp2cp2sp", "data", "packed")
    assert (row.status, row.rule) == ("ok", "")
    assert row.worst_grad > 1e-3, "this was no bf16 run"


def test_trajectories_are_equal(world):
    setting = setting_of(TINY_A, "--steps", "20")
    baseline = trajectory(world, setting, "cpu")
    assert len(baseline) == 20 and baseline[-1] < 0.8 * baseline[0]
    for layout, placement, form in (("pp2vpp2", "data", "packed"), ("tp2sp", "tensor", "dense")):
        row = check(world, setting, layout, placement, form, baseline)
        assert (row.status, row.rule) == ("ok", "")
        assert row.steps_rel < 1e-5


def test_a_step_that_differs_fails_the_row():
    row = Row("tp2", "data", "dense", "ok")
    judge_steps(row, [3.0, 2.0, 1.00002], [3.0, 2.0, 1.0])
    assert row.status == "failed" and "2.0e-05" in row.rule
    row = Row("tp2", "data", "dense", "ok")
    judge_steps(row, [3.0, float("nan")], [3.0, 2.0])
    assert row.status == "failed"


def test_names_of_layouts():
    assert len(ALL) == 16 and max(parse_layout(name, "data", "cpu").world_size for name in ALL) == 8
    parallel = parse_layout("tp2pp2cp2sp", "tensor", "cpu").parallel
    assert parallel.tensor_model_parallel_size == parallel.pipeline_model_parallel_size == 2
    assert parallel.context_parallel_size == 2 and parallel.sequence_parallel
    for wrong in ("tp2x", "tp0", "tp2tp4", "2", ""):
        if wrong:
            with pytest.raises(ConfigError, match="is no part"):
                parse_layout(wrong, "data", "cpu")


@pytest.mark.parametrize(
    ("layout", "packed", "rows"), [("dp2", False, 1), ("dp2", True, 1), ("pp2vpp2", True, 2)]
)
def test_what_does_not_fill_the_layout_is_masked_rows(layout, packed, rows):
    named = parse_layout(layout, "data", "cpu")
    docs = documents(read_reference(TINY_A / "reference.safetensors"), model_from_hf(TINY_A))
    batches = arrange(docs, Layout.from_config(named.parallel, named.world_size), packed)
    assert [len(of_rank) for of_rank in batches.rows] == [rows] * Layout.from_config(
        named.parallel, named.world_size
    ).dp
    assert sorted(place.number for place in batches.placed) == [0, 1]


def test_files_that_are_no_reference_are_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors here")
    for path in (tmp_path / "broken.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            read_reference(path)
    with pytest.raises(CheckpointError, match="not a reference file.*missing.*inputs.sample0.targets"):
        read_reference(TINY_A / "model-00001.safetensors")


def test_bad_arguments_exit_with_2(repo_root, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("check_parity", repo_root / "tools" / "check_parity.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    good = ["--hf", str(TINY_A), "--reference", str(TINY_A / "reference.safetensors")]
    for arguments, message in (
        ([*good, "--layouts", "tp2,qp2"], "layout 'qp2': 'qp2' is no part"),
        ([*good, "--placements", "both"], "placement 'both' is unknown"),
        ([*good, "--layouts", ","], "names no layout"),
        (["--hf", str(TINY_A.parent), *good[2:]], "config.json: cannot be read"),
        ([*good[:3], str(TINY_A / "config.json")], "not a readable safetensors file"),
    ):
        monkeypatch.setattr(sys, "argv", ["check_parity.py", *arguments])
        assert tool.main() == 2
        assert message in capsys.readouterr().err


def environment(repo_root):
    return os.environ | {"PYTHONPATH": str(repo_root)}


@pytest.mark.slow
def test_all_layouts_through_the_tool(repo_root, tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "tools/check_parity.py", "--hf", str(TINY_A), "--reference"]
    command += [str(TINY_A / "reference.safetensors"), "--layouts", "all", "--json", str(out)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, env=environment(repo_root))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(out.read_text())
    assert [row["status"] for row in rows] == ["ok"] * 96
    assert {(row["layout"], row["placement"], row["format"]) for row in rows} == {
        (layout, placement, form)
        for layout in ALL
        for placement in ("data", "tensor", "all")
        for form in ("dense", "packed")
    }
    assert max(row["worst_grad"] for row in rows) < 5e-5 and max(row["loss_rel"] for row in rows) < 2e-6
    assert "96 ok, 0 failed, 0 refused" in done.stdout
