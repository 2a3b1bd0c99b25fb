"""Delayed FP8 scaling through a checkpoint: the histories come back, in any layout."""

import pytest
import torch

from megatron_vl.checkpoint.stored import Stored
from tests.train import on_ranks, saving_on_ranks
from tests.train.test_saving import differences
from tests.train.tiny_run import LAYOUTS, load, losses, make_files, write_config

KEYS = ["precision.fp8=delayed", "precision.fp8_amax_history_len=8", "parallel.layer_backend=torch"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("data"))


def run(world, config, layout, *keys):
    return world.run(LAYOUTS[layout][0], on_ranks.pretrain, load(config, layout, *KEYS, *keys))


def test_histories_are_saved_resharded_and_continued(world, data, tmp_path):
    whole, parts = (write_config(data, tmp_path / name) for name in ("whole", "parts"))
    run(world, whole, "dp2tp2", "train.train_steps=4")
    run(world, parts, "dp2tp2", "train.train_steps=2")
    saved = tmp_path / "parts" / "checkpoints" / "step_00000002"
    stored = Stored(saved)
    keys = [key for key in stored.tensors if key.startswith("fp8/")]
    layers = {key.split("layers.")[1].split(".")[0] for key in keys}
    assert len(keys) == 4 * len(layers) and all(key.endswith("/history") for key in keys)
    for key in keys:
        history = stored.read(key)
        assert history.shape == (8, 3) and (history[:2] > 0).all() and (history[2:] == 0).all()
    again = load(parts, "tp2pp2", *KEYS, "train.train_steps=2")
    world.run(4, saving_on_ranks.resaved, again, str(tmp_path / "two"))
    assert differences(saved, tmp_path / "two" / "step_00000002") == []
    run(world, parts, "tp2pp2", "train.train_steps=4")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=2e-2)
    end = [
        Stored(tmp_path / name / "checkpoints" / "step_00000004").read(keys[0]) for name in ("parts", "whole")
    ]
    assert torch.equal(end[0][2:], end[1][2:]) and (end[0][:4] > 0).all()
