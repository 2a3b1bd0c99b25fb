"""A run begun from a Qwen3 text checkpoint and a PE-lang vision checkpoint, the bridge drawn fresh."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_vl.checkpoint.convert import write_checkpoint
from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.checkpoint.parts import POSITIONS, assemble, part_of, resized
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.config.hf_export import config_to_hf
from megatron_vl.errors import CheckpointError, ConfigErrors
from tests.checkpoint.converting import QUIET
from tests.fixtures.small import SMALL, RandomWeights

SHAPES = expected_tensors(SMALL)
MADE = RandomWeights(SMALL)
TEXT = {name: MADE(name).bfloat16() for name in SHAPES if part_of(name) == "text"}
TOWER = {name.removeprefix("vision_model."): MADE(name) for name in SHAPES if part_of(name) == "vision"}
BRIDGE = [name for name in SHAPES if part_of(name) in ("downsamplers", "projector")]
SIDE = SMALL.vision.global_grid


def write_text(folder: Path, tensors: dict | None = None, **changes: object) -> Path:
    """A Qwen3ForCausalLM folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config_to_hf(SMALL, "bfloat16")["text_config"], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(TEXT if tensors is None else tensors, folder / "model.safetensors")
    return folder


def write_vision(path: Path, tensors: dict | None = None, wrap=lambda tensors: tensors) -> Path:
    """A state dictionary in the naming of facebookresearch/perception_models."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(wrap(dict(TOWER if tensors is None else tensors)), path)
    return path


def test_every_tensor_comes_from_where_it_should(tmp_path):
    made = assemble(SMALL, write_text(tmp_path / "text"), write_vision(tmp_path / "pe.pt"), seed=9)
    assert set(made.weights) == set(SHAPES)
    for name, tensor in TEXT.items():
        assert (
            torch.equal(made.weights[name].read(), tensor) and made.weights[name].spec.dtype == torch.bfloat16
        )
    for name, tensor in TOWER.items():
        weight = made.weights[f"vision_model.{name}"]
        assert torch.equal(weight.read(), tensor) and weight.spec.dtype == torch.float32
    fresh = FreshWeights(SMALL, 9)
    for name in BRIDGE:  # most tensors above are of the text: fresh ones take its format
        expected = fresh(name).to(made.weights[BRIDGE[0]].spec.dtype)
        assert torch.equal(made.weights[name].read(), expected)
    assert [(part, count) for part, count, _ in made.origins] == [
        ("text", len(TEXT)), ("vision", len(TOWER)), ("downsamplers", 4), ("projector", 1),
    ]  # fmt: skip
    assert "seed 9" in made.origins[-1][2]


def test_it_becomes_a_checkpoint_to_start_from(tmp_path):
    made = assemble(SMALL, write_text(tmp_path / "text"), None, seed=9)
    write_checkpoint(made.weights, SMALL, tmp_path / "ck", QUIET, "text alone")
    stored = Stored(tmp_path / "ck")
    assert stored.model == SMALL and stored.check_files() == []
    assert torch.equal(stored.weight("model.norm.weight"), TEXT["model.norm.weight"])
    fresh = FreshWeights(SMALL, 9)
    for name in (*BRIDGE, POSITIONS, "vision_model.conv1.weight"):
        assert torch.equal(stored.weight(name), fresh(name).bfloat16())
    assert set(stored.state["source_dtypes"].values()) == {"BF16"}


def test_the_vision_part_alone(tmp_path):
    made = assemble(SMALL, None, write_vision(tmp_path / "pe.pt"), seed=9)
    assert {weight.spec.dtype for weight in made.weights.values()} == {torch.float32}
    assert torch.equal(made.weights["lm_head.weight"].read(), FreshWeights(SMALL, 9)("lm_head.weight"))


def test_no_part_at_all_is_refused():
    with pytest.raises(CheckpointError, match="neither --text nor --vision"):
        assemble(SMALL, None, None, seed=9)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"state_dict": t},
        lambda t: {"weights": {f"module.{n}": x for n, x in t.items()}},
        lambda t: {f"module.visual.{n}": x for n, x in t.items()} | {"module.text.token": torch.zeros(3)},
        lambda t: {f"visual.{n}": x for n, x in t.items()} | {"logit_scale": torch.zeros(())},
    ],
)
def test_the_wrappings_of_pe_files(tmp_path, wrap):
    made = assemble(SMALL, None, write_vision(tmp_path / "pe.pt", wrap=wrap), seed=9)
    assert torch.equal(made.weights["vision_model.conv1.weight"].read(), TOWER["conv1.weight"])


def test_a_safetensors_file_and_a_folder_with_one_file(tmp_path):
    save_file(TOWER, tmp_path / "pe.safetensors")
    (tmp_path / "folder").mkdir()
    write_vision(tmp_path / "folder" / "PE-Lang.pt")
    for path in (tmp_path / "pe.safetensors", tmp_path / "folder"):
        assert torch.equal(
            assemble(SMALL, None, path, 9).weights[POSITIONS].read(), TOWER["positional_embedding"]
        )


def test_pooling_and_projection_are_dropped_by_name(tmp_path):
    extra = {
        "proj": torch.zeros(2, 2),
        "attn_pool.probe": torch.zeros(1, 1, 4),
        "attn_pool.attn.in_proj_bias": torch.zeros(3),
    }
    made = assemble(SMALL, None, write_vision(tmp_path / "pe.pt", TOWER | extra), seed=9)
    assert sum("is not used: PE-lang has no pooling" in note for note in made.notes) == 3
    for name in extra:
        assert any(f"vision: {name} is not used" in note for note in made.notes)


def test_other_tensors_are_listed_and_refused(tmp_path):
    tensors = {name: t for name, t in TOWER.items() if "ls_1" not in name}
    tensors |= {"ln_post.weight": torch.zeros(4), "transformer.resblocks.2.ln_1.weight": torch.zeros(32)}
    tensors["conv1.weight"] = torch.zeros(32, 3, 7, 7)
    with pytest.raises(CheckpointError) as error:
        assemble(SMALL, None, write_vision(tmp_path / "pe.pt", tensors), seed=9)
    for line in (
        "5 tensor(s) do not fit the model",
        "missing: vision_model.transformer.resblocks.1.ls_1.gamma [32]",
        "unexpected: vision_model.ln_post.weight",
        "unexpected: vision_model.transformer.resblocks.2.ln_1.weight",
        "shape: vision_model.conv1.weight is [32, 3, 7, 7], the model wants [32, 3, 14, 14]",
    ):
        assert line in str(error.value)


def test_a_position_table_of_another_resolution(tmp_path):
    table = torch.randn(4 * 4, SMALL.vision.hidden_size)
    path = write_vision(tmp_path / "pe.pt", TOWER | {"positional_embedding": table})
    with pytest.raises(
        CheckpointError, match="grid of 4 x 4 patches, the model's is 8 x 8; give --resize-positions"
    ):
        assemble(SMALL, None, path, seed=9)
    made = assemble(SMALL, None, path, seed=9, resize_positions=True)
    grown = made.weights[POSITIONS].read()
    assert grown.shape == (SIDE**2, SMALL.vision.hidden_size) and torch.equal(grown, resized(table, SIDE))
    # corners of a bilinear resize without align_corners are the table's own; the middle is between its neighbours
    assert torch.allclose(grown[0], table[0]) and torch.allclose(grown[-1], table[-1])
    assert torch.allclose(grown[1], 0.75 * table[0] + 0.25 * table[1])
    assert any("resized bilinearly from 4 x 4 to 8 x 8" in note for note in made.notes)


def test_a_class_token_is_refused(tmp_path):
    tensors = TOWER | {
        "positional_embedding": torch.randn(SIDE**2 + 1, SMALL.vision.hidden_size),
        "class_embedding": torch.zeros(SMALL.vision.hidden_size),
    }
    with pytest.raises(CheckpointError, match="one for a class token, which this model does not have"):
        assemble(SMALL, None, write_vision(tmp_path / "pe.pt", tensors), seed=9, resize_positions=True)
    tensors["positional_embedding"] = torch.randn(51, SMALL.vision.hidden_size)
    with pytest.raises(CheckpointError, match="51 rows is no square grid"):
        assemble(SMALL, None, write_vision(tmp_path / "pe.pt", tensors), seed=9)


def test_tied_embeddings_begin_as_two_copies(tmp_path):
    tensors = {name: t for name, t in TEXT.items() if name != "lm_head.weight"}
    made = assemble(SMALL, write_text(tmp_path / "tied", tensors, tie_word_embeddings=True), None, seed=9)
    assert torch.equal(made.weights["lm_head.weight"].read(), TEXT["model.embed_tokens.weight"])
    assert any("lm_head.weight begins as a copy of model.embed_tokens.weight" in note for note in made.notes)
    # a head that is stored beside a tied embedding is what transformers ignores
    both = assemble(SMALL, write_text(tmp_path / "both", TEXT, tie_word_embeddings=True), None, seed=9)
    assert torch.equal(both.weights["lm_head.weight"].read(), TEXT["model.embed_tokens.weight"])
    with pytest.raises(CheckpointError, match="missing: lm_head.weight"):
        assemble(SMALL, write_text(tmp_path / "untied", tensors), None, seed=9)


def test_a_text_checkpoint_of_another_decoder(tmp_path):
    with pytest.raises(ConfigErrors) as error:
        assemble(SMALL, write_text(tmp_path / "a", rope_theta=5000.0, rms_norm_eps=1e-5), None, seed=9)
    assert "model.text.rotary_base = 1000000.0" in str(error.value)
    assert "model.text.layernorm_epsilon" in str(error.value)
    with pytest.raises(ConfigErrors, match="attention_bias"):
        assemble(SMALL, write_text(tmp_path / "b", attention_bias=True), None, seed=9)
    longer = write_text(tmp_path / "c", max_position_embeddings=40960, initializer_range=0.01)
    assert assemble(SMALL, longer, None, seed=9).weights  # not part of the computation


def test_text_tensors_that_do_not_fit(tmp_path):
    tensors = TEXT | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    with pytest.raises(CheckpointError, match="unexpected: model.layers.0.self_attn.q_proj.bias"):
        assemble(SMALL, write_text(tmp_path / "a", tensors), None, seed=9)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_vision_files_that_are_not_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="evil.pt: cannot be read as a state dictionary"):
        assemble(SMALL, None, tmp_path / "evil.pt", seed=9)
    assert not (tmp_path / "evil").exists()
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no state dictionary"):
        assemble(SMALL, None, tmp_path / "list.pt", seed=9)
    torch.save({"conv1.weight": torch.zeros(3, dtype=torch.int32)}, tmp_path / "int.pt")
    with pytest.raises(CheckpointError, match="conv1.weight is torch.int32"):
        assemble(SMALL, None, tmp_path / "int.pt", seed=9)
    with pytest.raises(CheckpointError, match="not a folder, .safetensors"):
        assemble(SMALL, None, tmp_path / "nowhere.pt", seed=9)


def test_seeds_draw_different_bridges(tmp_path):
    text = write_text(tmp_path / "text")
    first, second = (assemble(SMALL, text, None, seed) for seed in (1, 2))
    for name in BRIDGE:
        same = torch.equal(first.weights[name].read(), second.weights[name].read())
        assert same == name.endswith("bias")


def test_heads_can_only_be_checked_where_a_file_names_them(tmp_path):
    """A PE file has no configuration: another number of heads has the same shapes, which the notes say."""
    other = replace(SMALL, vision=replace(SMALL.vision, num_attention_heads=2))
    made = assemble(other, None, write_vision(tmp_path / "pe.pt"), seed=9)
    assert any("number of heads and activation are not in a PE file" in note for note in made.notes)
