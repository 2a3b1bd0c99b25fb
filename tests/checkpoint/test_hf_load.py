"""A checkpoint directory that is not exactly the model's is refused, with everything wrong listed at once."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vl.checkpoint.hf_load import INDEX, HFCheckpoint
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.errors import CheckpointError
from tests.fixtures.paths import TINY_A

FIRST = "model-00001.safetensors"


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(TINY_A, copy, ignore=shutil.ignore_patterns("reference.safetensors"))
    return copy


def edit(folder, change):
    """Rewrite the first shard, and the index so that it agrees."""
    tensors = load_file(folder / FIRST)
    change(tensors)
    save_file(tensors, folder / FIRST)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != FIRST}
    index["weight_map"] |= dict.fromkeys(tensors, FIRST)
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        HFCheckpoint(folder).check(model_from_hf(TINY_A))
    return str(error.value)


def test_the_golden_checkpoint_is_accepted(folder):
    checkpoint = HFCheckpoint(folder)
    checkpoint.check(model_from_hf(folder))
    assert checkpoint.shape_and_dtype("lm_head.weight") == ((512, 64), "F32")
    assert checkpoint.tensor("vision_model.conv1.weight").shape == (64, 3, 14, 14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_accepted(folder, dtype):
    edit(folder, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    HFCheckpoint(folder).check(model_from_hf(folder))


def test_everything_wrong_is_listed_at_once(folder):
    def change(tensors):
        names = sorted(tensors)
        del tensors[names[0]]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
        tensors[names[1]] = tensors[names[1]][None]
        tensors[names[2]] = tensors[names[2]].to(torch.int32)
        change.names = names

    edit(folder, change)
    message, names = refused(folder), change.names
    assert "4 tensor(s) do not fit the model" in message
    assert f"missing: {names[0]} [" in message
    assert "unexpected: model.layers.9.mlp.up_proj.weight" in message
    assert f"shape: {names[1]} is [1, " in message and "the model wants" in message
    assert f"dtype: {names[2]} is I32, expected one of F32, BF16, F16, F64" in message


def test_a_tensor_that_the_index_promises_but_the_file_lacks(folder):
    tensors = load_file(folder / FIRST)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, folder / FIRST)
    assert name in refused(folder)


@pytest.mark.parametrize("path", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_may_not_leave_the_directory(folder, path):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = path
    (folder / INDEX).write_text(json.dumps(index))
    message = refused(folder)
    assert "must be plain file names inside the directory" in message and path in message


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}', "\u00ff"])
def test_a_broken_index(folder, content):
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    message = refused(folder)
    assert INDEX in message and "weight_map" in message


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002.safetensors").unlink()
    assert "shard(s) ['model-00002.safetensors'] named by" in refused(folder)


@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_a_damaged_shard_is_named(folder, keep):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:keep])
    assert f"{FIRST}: not a readable safetensors file" in refused(folder)


def test_directories_without_weights(tmp_path):
    for path, message in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "neither")):
        with pytest.raises(CheckpointError, match=message):
            HFCheckpoint(path)


def test_one_file_without_an_index(folder, tmp_path):
    tensors = {}
    for path in folder.glob("model-*.safetensors"):
        tensors |= load_file(path)
    single = tmp_path / "single"
    single.mkdir()
    save_file(tensors, single / "model.safetensors")
    HFCheckpoint(single).check(model_from_hf(TINY_A))
