"""The parity check can fail: planted faults and a disturbed reference are caught, and the tensor is named."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from megatron_vl.parity.compare import relative
from megatron_vl.parity.reference import read_reference
from tests.fixtures.paths import TINY_A
from tests.parity.checking import check, setting_of
from tests.parity.faults import FaultyWorld


@pytest.fixture(scope="module")
def tiny_a():
    return setting_of(TINY_A, "--bisect")


# fault, layout, placement, form, first tensor that diverges, what the name of the worst gradient holds
CAUGHT = (
    ("no_tensor_parallel_sum", "tp2", "data", "dense", "gradients only", "vision_model"),
    ("no_row_parallel_reduce", "tp2", "data", "dense", "sample0.embeds", "model."),
    ("no_row_parallel_reduce", "tp2", "tensor", "dense", "vision.crop.block0", ""),
    ("no_sequence_parallel_reduce", "tp2sp", "data", "dense", "gradients only", "norm"),
    ("no_context_parallel_sum", "cp2ag", "tensor", "packed", "gradients only", ""),
    ("no_gradient_from_other_owners", "cp2", "data", "dense", "gradients only", "vision_model"),
    ("no_gradient_from_other_owners", "tp2sp", "tensor", "packed", "gradients only", "vision_model"),
    ("gradient_from_every_copy", "tp2", "data", "dense", "gradients only", "vision_model"),
    ("features_of_the_neighbour", "tp2sp", "data", "packed", "sample0.embeds", ""),
    ("no_sum_over_all_ranks", "pp2", "all", "packed", "gradients only", "vision_model"),
    ("features_of_the_neighbour", "pp2", "all", "dense", "sample0.embeds", ""),
    ("no_ring_gradients", "cp2", "data", "dense", "gradients only", ""),
    ("mean_of_tokens", "1", "data", "dense", "gradients only", ""),
    ("mean_over_data_parallel", "dp2", "data", "dense", "gradients only", ""),
    ("unshifted_labels", "pp2", "data", "dense", "sample0.ce", ""),
    ("unshifted_labels", "1", "data", "packed", "sample0.ce", ""),
)


@pytest.mark.parametrize(("fault", "layout", "placement", "form", "first", "worst"), CAUGHT)
def test_a_planted_fault_is_caught_and_named(world, tiny_a, fault, layout, placement, form, first, worst):
    row = check(FaultyWorld(world, fault), tiny_a, layout, placement, form)
    assert row.status == "failed"
    assert row.diverged == first
    assert worst in row.worst_name and row.worst_grad > 1e-2
    assert "over the bound" in row.rule and row.worst_name


PLACES = (
    ("wrong_position_table", "1", "data", "vision.crop.embed"),
    ("wrong_tower_block", "tp2", "tensor", "vision.crop.block1"),
    ("wrong_projector", "cp2", "data", "vision.crop.projected"),
    ("wrong_decoder_layer", "pp2", "data", "sample0.hidden2"),
    ("wrong_head", "tp2pp2", "data", "sample0.logits"),
)


@pytest.mark.parametrize(("fault", "layout", "placement", "first"), PLACES)
def test_bisect_names_the_place_of_a_wrong_weight(world, tiny_a, fault, layout, placement, first):
    row = check(FaultyWorld(world, fault), tiny_a, layout, placement, "dense")
    assert (row.status, row.diverged) == ("failed", first)


def test_faults_are_gone_afterwards(world, tiny_a):
    row = check(world, tiny_a, "tp2sp", "data", "dense")
    assert (row.status, row.diverged) == ("ok", "nothing")


DISTURBED = "model.layers.1.mlp.up_proj.weight"


def test_a_gradient_disturbed_by_a_thousandth_fails_the_tool(repo_root, tmp_path):
    tensors = read_reference(TINY_A / "reference.safetensors").tensors
    tensors[f"grad.{DISTURBED}"] = tensors[f"grad.{DISTURBED}"] * 1.001
    save_file(tensors, tmp_path / "disturbed.safetensors")
    command = [sys.executable, "tools/check_parity.py", "--hf", str(TINY_A), "--layouts", "1"]
    command += ["--reference", str(tmp_path / "disturbed.safetensors"), "--json", str(tmp_path / "rows.json")]
    command += ["--placements", "data", "--formats", "dense"]
    environment = os.environ | {"PYTHONPATH": str(repo_root)}
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["status"], row["worst_name"]) == ("failed", DISTURBED)
    assert row["worst_grad"] == pytest.approx(1e-3, rel=0.01)
    assert f"1 over the bound: grad {DISTURBED} 1.0e-03" in row["rule"]
    assert DISTURBED in done.stdout and "0 ok, 1 failed" in done.stdout


def test_nothing_odd_counts_as_near():
    ones = torch.ones(4)
    assert relative(ones, ones) == 0
    assert relative(ones * float("nan"), ones) == float("inf")
    assert relative(ones * float("inf"), ones) == float("inf")
    assert relative(torch.ones(5), ones) == float("inf")
    assert relative(ones, torch.zeros(4)) == pytest.approx(2.0)
