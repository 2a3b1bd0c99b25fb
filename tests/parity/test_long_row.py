"""A long packed row in several layouts: equal loss; and, in fresh processes, memory that falls with the ranks."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.errors import ConfigError
from megatron_vl.parity.layouts import parse_layout
from megatron_vl.parity.long_row import LONG_MODEL, LongRow, job_of, make_row, micro_batch, run_long
from megatron_vl.plan.layout import Layout

ROOT = Path(__file__).parents[2]
SHORT = LongRow(seq_length=3072, documents=4, images=2)


def test_rows_fill_the_length_and_hold_the_images():
    spec = LongRow(seq_length=16_384, documents=9, images=12)
    rows = make_row(spec, LONG_MODEL)
    padded = sum(-(-len(row.ids) // 64) * 64 for row in rows)
    assert 0.9 * spec.seq_length < padded <= spec.seq_length
    assert sum(Counter(row.view_kinds)[1] for row in rows) == 12
    assert all((row.labels != -100).any() for row in rows)
    slots = sum(np.count_nonzero(row.ids == LONG_MODEL.tokens.im_patch) for row in rows)
    assert slots == sum(169 if kind else 81 for row in rows for kind in row.view_kinds)


def test_too_many_images():
    with pytest.raises(ConfigError, match="--images 60: their .* leave no room"):
        make_row(LongRow(seq_length=4096, documents=4, images=60), LONG_MODEL)


def test_ranks_get_the_pixels_that_one_rank_has():
    whole = micro_batch(SHORT, LONG_MODEL, Layout(), 0)
    layout = Layout(tp=1, cp=4)
    shares = [micro_batch(SHORT, LONG_MODEL, layout, rank) for rank in range(4)]
    for name in ("crop_pixels", "global_pixels"):
        pieces = {p.numpy().tobytes() for share in shares for p in getattr(share, name)}
        assert pieces == {p.numpy().tobytes() for p in getattr(whole, name)}
    assert all(torch.equal(share.input_ids, whole.input_ids) for share in shares)


@pytest.mark.parametrize("layout", ["cp8", "tp2cp4sp"])
def test_the_loss_is_that_of_one_rank(world, layout):
    losses = []
    for name in ("1", layout):
        job = job_of(parse_layout(name, "data", "cpu"), SHORT, LONG_MODEL, RecomputeConfig())
        seen = world.run(parse_layout(name, "data", "cpu").world_size, run_long, job)
        losses.append((seen[0].loss, seen[0].grad_norm))
    (loss, norm), (other, other_norm) = losses
    assert abs(other - loss) < 1e-5 * loss and abs(other_norm - norm) < 1e-5 * norm


@pytest.mark.slow
def test_memory_falls_with_the_ranks():
    """The tool's own bounds at an eighth of the length, in fresh processes."""
    command = [
        sys.executable,
        "tools/check_long_row.py",
        "--seq-length",
        "16384",
        "--documents",
        "8",
        "--images",
        "13",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^(1|cp8|tp2cp4sp) ", done.stdout, flags=re.M)) == 3
