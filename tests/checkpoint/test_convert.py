"""Import and export: bit for bit there and back, refusals before a byte is written, nothing half-done left."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_vl.checkpoint import aside as aside_module
from megatron_vl.checkpoint import weights as weights_module
from megatron_vl.checkpoint.compare import compare, open_side
from megatron_vl.checkpoint.convert import export_hf, import_hf
from megatron_vl.checkpoint.digests import read_digests
from megatron_vl.checkpoint.hf_load import INDEX, HFCheckpoint
from megatron_vl.checkpoint.safetensors_file import ShardWriter
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.checkpoint.torch_dist import Digesting
from megatron_vl.checkpoint.weights import CheckpointWeights, HFWeights
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.errors import CheckpointError, ConfigErrors
from tests.checkpoint.converting import (
    QUIET,
    all_tensors,
    assert_same,
    copy_of_tiny_a,
    edit_state,
    mixed,
    trained,
    trained_tiny,
)
from tests.fixtures.paths import TINY_A
from tests.fixtures.unseen import no_token_table, six_heads, three_layers


def there_and_back(source: Path, folder: Path, template: bool = False) -> Path:
    import_hf(HFWeights(source), folder / "ck", QUIET)
    export_hf(CheckpointWeights(folder / "ck"), folder / "hf", QUIET, source if template else None)
    return folder / "hf"


@pytest.mark.parametrize("template", [False, True])
def test_the_golden_checkpoint_comes_back_bit_for_bit(tmp_path, template):
    back = there_and_back(TINY_A, tmp_path, template)
    assert_same(all_tensors(TINY_A), all_tensors(back))
    assert json.loads((back / INDEX).read_text())["metadata"] == {"total_size": 3041344}
    assert sorted(p.name for p in back.glob("*.safetensors")) == ["model-00001.safetensors"]
    assert model_from_hf(back) == model_from_hf(TINY_A)
    HFCheckpoint(back).check(model_from_hf(back))
    assert not dist.is_initialized()
    if template:
        for name in ("config.json", "generation_config.json", "added_tokens.json"):
            assert (back / name).read_bytes() == (TINY_A / name).read_bytes()


@pytest.mark.parametrize("make", [six_heads, three_layers, no_token_table, mixed], ids=lambda m: m.__name__)
def test_so_do_checkpoints_that_were_never_seen(tmp_path, monkeypatch, make):
    monkeypatch.setattr(weights_module, "BLOCK_BYTES", 3000)  # many blocks per tensor
    source = make(tmp_path / "source")
    back = there_and_back(source, tmp_path)
    assert_same(all_tensors(source), all_tensors(back))
    assert model_from_hf(back) == model_from_hf(source)
    # and the checkpoint in between, digest by digest
    assert compare(open_side(source), open_side(tmp_path / "ck"), quiet=True).differences == []


def test_whole_big_tensors_are_read_box_by_box(tmp_path, monkeypatch):
    checkpoint, stored, _ = trained_tiny(tmp_path / "ck", torch.float32, None)
    monkeypatch.setattr(weights_module, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(weights_module, "WHOLE_BYTES", 0)
    export_hf(CheckpointWeights(checkpoint), tmp_path / "hf", QUIET)
    assert_same(stored, all_tensors(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("stored", "source"), [(torch.float32, "BF16"), (torch.float32, None), (torch.bfloat16, "BF16")]
)
def test_an_export_goes_back_to_the_source_formats(tmp_path, stored, source):
    checkpoint, weights, _ = trained_tiny(tmp_path / "run" / "checkpoints" / "step_00000007", stored, source)
    export_hf(CheckpointWeights(checkpoint), tmp_path / "hf", QUIET)
    kept = torch.bfloat16 if source else stored
    assert_same({name: tensor.to(kept) for name, tensor in weights.items()}, all_tensors(tmp_path / "hf"))


def test_formats_that_are_asked_for(tmp_path):
    original = all_tensors(TINY_A)
    import_hf(HFWeights(TINY_A), tmp_path / "ck", replace(QUIET, dtype="bf16"))
    assert set(Stored(tmp_path / "ck").state["source_dtypes"].values()) == {"BF16"}
    for asked, dtype in (("keep", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / asked, replace(QUIET, dtype=asked))
        assert_same({n: t.bfloat16().to(dtype) for n, t in original.items()}, all_tensors(tmp_path / asked))
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"


def test_a_wider_format_than_stored_comes_from_the_main_weights(tmp_path):
    checkpoint, _, fine = trained_tiny(tmp_path / "ck", torch.bfloat16, "F32", with_main=True)
    export_hf(CheckpointWeights(checkpoint), tmp_path / "keep", QUIET)
    assert_same(fine, all_tensors(tmp_path / "keep"))
    export_hf(CheckpointWeights(checkpoint), tmp_path / "bf16", replace(QUIET, dtype="bf16"))
    assert_same({n: t.bfloat16() for n, t in fine.items()}, all_tensors(tmp_path / "bf16"))


def test_shards_have_the_size_that_is_asked_for(tmp_path):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    result = export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / "hf", QUIET, shard_bytes=700_000)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "hf").glob("*.safetensors"))]
    assert len(sizes) == 5 and max(sizes) == sizes[3] > 700_000 > sorted(sizes)[-2]  # one tensor is larger
    assert_same(all_tensors(TINY_A), all_tensors(tmp_path / "hf"))
    assert (result.figures.tensors, result.figures.parameters, result.figures.nbytes) == (98, 760336, 3041344)


def test_an_import_records_where_it_is_from_and_what_it_was(tmp_path):
    source = mixed(tmp_path / "source")
    import_hf(HFWeights(source), tmp_path / "ck", QUIET)
    stored = Stored(tmp_path / "ck")
    assert stored.check_files() == []
    assert stored.model == model_from_hf(source)
    assert stored.state["progress"] == {"step": 0, "tokens": 0, "data": "", "samples": 0, "skipped": 0}
    assert stored.state["layout"] is None and stored.state["origin"] == f"imported from {source}"
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    assert stored.state["source_dtypes"] == {n: names[t.dtype] for n, t in all_tensors(source).items()}


def test_all_differences_are_listed_before_a_byte_is_written(tmp_path):
    source = copy_of_tiny_a(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    config["text_config"]["intermediate_size"] = 96
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        import_hf(HFWeights(source), tmp_path / "ck", QUIET)
    assert "missing: model.layers.4.mlp.up_proj.weight [96, 64]" in str(error.value)
    assert "shape: model.layers.0.mlp.up_proj.weight is [128, 64], the model wants [96, 64]" in str(
        error.value
    )
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_that_is_not_its_models_is_listed(tmp_path):
    model = model_from_hf(TINY_A)
    weights = all_tensors(TINY_A)
    weights["model.extra"] = weights.pop("lm_head.weight")
    weights["model.norm.weight"] = weights["model.norm.weight"][:5]
    weights["vision_model.conv1.weight"] = weights["vision_model.conv1.weight"].int()
    with pytest.raises(CheckpointError) as error:
        CheckpointWeights(trained(tmp_path / "ck", weights, model, None))
    for line in (
        "missing: lm_head.weight",
        "unexpected: model.extra",
        "shape: model.norm.weight is stored as (5, 1), the model wants (64, 1)",
        "dtype: vision_model.conv1.weight is torch.int32",
    ):
        assert line in str(error.value)


def test_a_file_that_is_missing_or_cut_off(tmp_path):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    files = sorted((tmp_path / "ck").glob("*.distcp"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-10])
    with pytest.raises(CheckpointError) as error:
        CheckpointWeights(tmp_path / "ck")
    assert f"{files[0]} is missing" in str(error.value) and f"{files[1]} has" in str(error.value)


def test_a_flipped_byte_is_noticed_while_exporting(tmp_path):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    path = max((tmp_path / "ck").glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / "hf", QUIET)
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.tmp").exists()


def test_stored_digests_are_compared(tmp_path):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    digests = Stored(tmp_path / "ck").state["tensor_digests"]
    digests["lm_head.weight"]["sha256"] = "0" * 64
    edit_state(tmp_path / "ck", tensor_digests=digests)
    with pytest.raises(CheckpointError, match="lm_head.weight: its values are not those of the digest"):
        export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / "hf", QUIET)
    edit_state(tmp_path / "ck", tensor_digests={"lm_head.weight": 3})
    with pytest.raises(CheckpointError, match="tensor_digests cannot be read"):
        export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / "hf", QUIET)


def test_targets_that_exist(tmp_path):
    source = HFWeights(TINY_A)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="mine exists: choose another target, or give --force"):
        import_hf(source, tmp_path / "mine", QUIET)
    with pytest.raises(CheckpointError, match="holds neither a checkpoint nor safetensors: --force does not"):
        import_hf(source, tmp_path / "mine", replace(QUIET, replace=True))
    assert (tmp_path / "mine" / "thesis.txt").exists()
    import_hf(source, tmp_path / "ck", QUIET)
    before = (tmp_path / "ck" / "state.json").stat().st_ino
    import_hf(source, tmp_path / "ck", replace(QUIET, replace=True))
    assert (tmp_path / "ck" / "state.json").stat().st_ino != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck", "mine"]


def test_a_half_written_target_is_not_taken_over(tmp_path):
    (tmp_path / "ck.tmp").mkdir()
    with pytest.raises(
        CheckpointError, match="ck.tmp exists: another conversion writes it, or one was killed"
    ):
        import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    import_hf(HFWeights(TINY_A), tmp_path / "ck", replace(QUIET, replace=True))
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_a_failed_replacement_keeps_the_old_target(tmp_path, monkeypatch):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    before = (tmp_path / "ck" / "state.json").stat().st_ino
    monkeypatch.setattr("megatron_vl.checkpoint.convert.publish", _fail(OSError(errno.EIO, "I/O error")))
    with pytest.raises(CheckpointError, match="I/O error"):
        import_hf(HFWeights(TINY_A), tmp_path / "ck", replace(QUIET, replace=True))
    assert (tmp_path / "ck" / "state.json").stat().st_ino == before
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def _fail(error: Exception, after: int = 0, then=None):
    calls = [0]

    def failing(*args, **kwargs):
        calls[0] += 1
        if calls[0] > after:
            raise error
        return then(*args, **kwargs)

    return failing


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full; what was written is removed"), (errno.EACCES, "cannot be written")],
)
def test_a_disk_that_fails_in_the_middle(tmp_path, monkeypatch, number, message):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(ShardWriter, "_write", _fail(error, 20, ShardWriter._write))
    with pytest.raises(CheckpointError, match=message):
        export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / "hf", QUIET)
    monkeypatch.setattr(Digesting, "_put", _fail(error, 20, Digesting._put))
    with pytest.raises(CheckpointError, match=message):
        import_hf(HFWeights(TINY_A), tmp_path / "ck2", QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 3_000_000})()
    monkeypatch.setattr(aside_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="0.00 GB are needed and 0.00 GB are free"):
        import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="writing failed|cannot be written"):
        import_hf(HFWeights(TINY_A), tmp_path / "file" / "ck", QUIET)


def test_consume_removes_each_source_file_after_its_digests_are_stored(tmp_path, capsys):
    source = copy_of_tiny_a(tmp_path / "source")
    original = all_tensors(source)
    options = replace(QUIET, consume=True, digests=tmp_path / "digests.json")
    import_hf(HFWeights(source), tmp_path / "ck", options)
    assert list(source.glob("model*")) == [] and (source / "config.json").is_file()
    assert "--consume: removed" in capsys.readouterr().err
    assert set(read_digests(tmp_path / "digests.json")) == set(original)
    export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / "hf", options, shard_bytes=700_000)
    assert list((tmp_path / "ck").glob("*.distcp")) == [] and not (tmp_path / "ck" / "manifest.json").exists()
    assert_same(original, all_tensors(tmp_path / "hf"))
    assert (
        compare(open_side(tmp_path / "hf"), open_side(tmp_path / "digests.json"), quiet=True).differences
        == []
    )
    assert not (tmp_path / "hf" / "CONSUMED").exists()


def test_an_interrupted_consume_keeps_what_exists_nowhere_else(tmp_path, monkeypatch):
    source = copy_of_tiny_a(tmp_path / "source")
    original = load_file(source / "model-00001.safetensors")
    options = replace(QUIET, consume=True, digests=tmp_path / "digests.json")
    real = weights_module.ShardReader.read

    def read(reader, name, first, rows):
        if reader.path.name == "model-00002.safetensors":
            raise CheckpointError("unreadable")
        return real(reader, name, first, rows)

    monkeypatch.setattr(weights_module.ShardReader, "read", read)
    with pytest.raises(CheckpointError, match="ck.tmp is kept: it holds the weights that --consume removed"):
        import_hf(HFWeights(source), tmp_path / "ck", options)
    assert sorted(p.name for p in source.glob("*.safetensors")) == [
        "model-00002.safetensors",
        "model-00003.safetensors",
    ]
    assert set(read_digests(tmp_path / "digests.json")) == set(original)
    assert list((tmp_path / "ck.tmp").glob("*.distcp"))
    with pytest.raises(CheckpointError, match="an interrupted --consume has removed; move it away first"):
        import_hf(HFWeights(TINY_A), tmp_path / "ck", replace(QUIET, replace=True))


def test_consume_leaves_optimizer_state_alone(tmp_path):
    checkpoint, _, _ = trained_tiny(tmp_path / "ck", torch.bfloat16, "BF16", with_main=True)
    options = replace(QUIET, consume=True, digests=tmp_path / "d.json")
    with pytest.raises(CheckpointError, match="would destroy the optimizer state"):
        export_hf(CheckpointWeights(checkpoint), tmp_path / "hf", options)
    assert Stored(checkpoint).check_files() == []


def test_a_template_of_another_model_is_refused(tmp_path):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    template = copy_of_tiny_a(tmp_path / "template")
    config = json.loads((template / "config.json").read_text())
    config["text_config"]["rope_theta"] = 10000.0
    (template / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigErrors, match="model.text.rotary_base = 1000000.0: .*config.json says 10000.0"):
        export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / "hf", QUIET, template)
    assert not (tmp_path / "hf").exists()


def test_only_known_files_of_a_template_are_copied(tmp_path):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    template = copy_of_tiny_a(tmp_path / "template")
    for name in (
        "modeling_step_vl.py",
        "chat_template.jinja",
        "tokenizer.json",
        "notes.md",
        "old.bin",
        "x.pt",
    ):
        (template / name).write_text(name)
    (template / "generation_config.json").unlink()
    (template / "sub").mkdir()
    (template / "sub" / "evil.py").write_text("")
    (template / "processing_step3.py").symlink_to(template / "modeling_step_vl.py")
    result = export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / "hf", QUIET, template)
    names = sorted(p.name for p in (tmp_path / "hf").iterdir())
    assert names == [
        "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json",
        "model-00001.safetensors", INDEX, "modeling_step_vl.py", "processing_step3.py", "tokenizer.json",
    ]  # fmt: skip
    assert not (tmp_path / "hf" / "processing_step3.py").is_symlink()
    assert ("modeling_step_vl.py", str(template)) in result.companions
    assert ("generation_config.json", "our configuration") in result.companions
    assert result.notes == [f"not copied from {template}: golden.json, notes.md"]
