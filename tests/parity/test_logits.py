"""Weights through live ranks: equal logits for equal weights, other logits for others, transformers agrees."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_vl.checkpoint.convert import export_hf, import_hf
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.checkpoint.weights import CheckpointWeights, HFWeights
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.errors import CheckpointError, ConfigErrors
from megatron_vl.parity import logits as logits_module
from megatron_vl.parity.logits import compare_logits, example_documents, logits_on_rank
from megatron_vl.parity.resave import layout_of, resave_on_rank
from tests.checkpoint.converting import QUIET, all_tensors, assert_same, copy_of_tiny_a
from tests.fixtures.paths import TINY_A
from tests.fixtures.unseen import six_heads

TP2PP2 = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]


@pytest.fixture
def worlds(world, monkeypatch):
    """`compare_logits` uses the session's ranks instead of starting one."""

    class Shared:
        def __init__(self, size):
            self.run = world.run

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return None

    monkeypatch.setattr(logits_module, "LocalWorld", Shared)


def test_equal_weights_give_equal_logits_and_one_changed_weight_does_not(tmp_path, worlds):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    text, same = compare_logits(HFWeights(TINY_A), CheckpointWeights(tmp_path / "ck"))
    assert same and "relative L2 0.0e+00" in text and "52 tokens in 2 documents" in text
    changed = copy_of_tiny_a(tmp_path / "changed")
    path = changed / "model-00002.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(path)
    name = "vision_model.transformer.resblocks.1.ls_1.gamma"
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, path)
    text, same = compare_logits(HFWeights(TINY_A), HFWeights(changed))
    assert not same, text


def test_the_documents_use_every_kind_of_view():
    documents = example_documents(model_from_hf(TINY_A))
    assert [len(d.kinds) for d in documents] == [0, 3]
    again = example_documents(model_from_hf(TINY_A))
    assert all((a.ids == b.ids).all() for a, b in zip(documents, again))


def test_different_models_and_too_little_memory(tmp_path, monkeypatch):
    six_heads(tmp_path / "six")
    with pytest.raises(CheckpointError, match="are different models .*text.num_layers"):
        compare_logits(HFWeights(TINY_A), HFWeights(tmp_path / "six"))
    memory = type("Memory", (), {"available": 1000})()
    monkeypatch.setattr(logits_module.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(CheckpointError, match="GB of memory are needed, 0.0 GB are free"):
        compare_logits(HFWeights(TINY_A), HFWeights(TINY_A))


@pytest.mark.parametrize("placement", ["data", "tensor"])
@pytest.mark.parametrize("make", [None, six_heads], ids=["tiny_a", "six_heads"])
def test_a_load_and_resave_at_tp2pp2_in_between_changes_no_bit(tmp_path, world, make, placement):
    source = make(tmp_path / "source") if make else TINY_A
    import_hf(HFWeights(source), tmp_path / "ck", QUIET)
    stored = Stored(tmp_path / "ck")
    settings = [*TP2PP2, f"parallel.vision_placement={placement}"]
    config = layout_of(stored, 4, settings)
    written = world.run(4, resave_on_rank, config, tmp_path / "ck", tmp_path / "again")[0]
    again = Stored(written)
    assert again.state["layout"]["tp"] == again.state["layout"]["pp"] == 2
    assert again.state["source_dtypes"] == stored.state["source_dtypes"]
    assert {again.tensors[key].dtype for key in again.tensors if key.startswith("model/")} == {torch.float32}
    assert len({chunk.file for tensor in again.tensors.values() for chunk in tensor.chunks}) == 4
    export_hf(CheckpointWeights(written), tmp_path / "hf", QUIET)
    assert_same(all_tensors(source), all_tensors(tmp_path / "hf"))


def test_an_illegal_layout_is_refused_before_ranks_start(tmp_path):
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    with pytest.raises(ConfigErrors, match="tensor_model_parallel_size"):
        layout_of(Stored(tmp_path / "ck"), 3, ["parallel.tensor_model_parallel_size=3"])


def test_transformers_computes_the_same_from_the_exported_text_part(tmp_path, world):
    transformers = pytest.importorskip("transformers")
    import_hf(HFWeights(TINY_A), tmp_path / "ck", QUIET)
    export_hf(CheckpointWeights(tmp_path / "ck"), tmp_path / "hf", QUIET)
    text = tmp_path / "text"
    text.mkdir()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    (text / "config.json").write_text(json.dumps(config))
    tensors = all_tensors(tmp_path / "hf")
    kept = {name: t for name, t in tensors.items() if name.startswith(("model.", "lm_head."))}
    save_file(kept, text / "model.safetensors", metadata={"format": "pt"})
    model, found = transformers.Qwen3ForCausalLM.from_pretrained(
        text, output_loading_info=True, dtype=torch.float32
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor(example_documents(model_from_hf(TINY_A))[0].ids)[None]
    with torch.no_grad():
        theirs = model.eval()(ids).logits[0]
    ours = world.run(1, logits_on_rank, tmp_path / "hf")[0][0]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
