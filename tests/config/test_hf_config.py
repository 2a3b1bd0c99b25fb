"""The released config.json: what is read, what is filled in, what is refused."""

import copy
import json

import pytest

from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.load import load_run
from megatron_vl.config.model import ModelConfig
from megatron_vl.errors import ConfigErrors

SMALL = {
    "architectures": ["StepVLForConditionalGeneration"],
    "model_type": "step_robotics",
    "image_token_len": 4,
    "patch_token_len": 1,
    "image_token_id": 50,
    "projector_bias": False,
    "use_im_start_end": "true",
    "vision_select_layer": -1,
    "special_token_ids": {"im_patch": 50, "im_start": 51, "chat_end": 7},
    "vision_config": {
        "image_size": 112,
        "patch_size": 14,
        "width": 48,
        "layers": 2,
        "heads": 2,
        "mlp_ratio": 2.75,
        "pool_type": "none",
        "output_dim": None,
        "use_cls_token": False,
        "ues_cls_token": False,
        "ls_init_value": 0.2,
        "use_ln_post": False,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "model_type": "qwen3",
        "eos_token_id": [1, 2],
        "head_dim": 16,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 5000,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 96,
    },
}


def changed(path: str, value) -> dict:
    """SMALL with one field set; `path` is `field` or `section.field`."""
    config = copy.deepcopy(SMALL)
    *section, name = path.split(".")
    part = config[section[0]] if section else config
    part[name] = value
    return config


def test_small_model():
    model = model_from_hf(SMALL)
    vision, text = model.vision, model.text
    assert (vision.image_size, vision.crop_size, vision.global_grid, vision.crop_grid) == (112, 56, 8, 4)
    assert (vision.global_tokens, vision.crop_tokens, vision.output_size) == (4, 1, 192)
    assert (vision.hidden_size, vision.num_layers, vision.num_attention_heads, vision.head_dim) == (
        48,
        2,
        2,
        24,
    )
    assert (vision.ffn_hidden_size, vision.layernorm_epsilon, vision.layer_scale_init) == (132, 1e-6, 0.2)
    assert (text.hidden_size, text.num_layers, text.num_attention_heads, text.num_query_groups) == (
        40,
        3,
        6,
        3,
    )
    assert (text.kv_channels, text.ffn_hidden_size, text.vocab_size, text.rotary_base) == (16, 72, 96, 5000.0)
    assert isinstance(text.rotary_base, float)
    assert (model.tokens.im_patch, model.tokens.im_start, model.tokens.chat_end) == (50, 51, 7)
    assert model.tokens.patch_newline == 151691


@pytest.mark.parametrize("config", [{}, {"vision_config": {}, "text_config": {}}, {"vision_config": None}])
def test_missing_fields_take_the_released_values(config):
    assert model_from_hf(config) == ModelConfig()


def test_null_is_missing():
    assert model_from_hf(changed("text_config.head_dim", None)).text.kv_channels == 128


@pytest.mark.parametrize(
    ("width", "ratio", "inner"),
    [(1536, 8960 / 1536, 8960), (64, 2.75, 176), (80, 35 / 6, 466), (100, 5.84, 584)],
)
def test_inner_width(width, ratio, inner):
    config = changed("vision_config.width", width)
    config["vision_config"]["mlp_ratio"] = ratio
    assert model_from_hf(config).vision.ffn_hidden_size == inner


@pytest.mark.parametrize(("tokens", "patch", "crop"), [(81, 14, 504), (9, 14, 168), (4, 16, 128)])
def test_crop_size(tokens, patch, crop):
    config = {"patch_token_len": tokens, "vision_config": {"patch_size": patch, "image_size": 52 * patch}}
    model = model_from_hf(config)
    assert model.vision.crop_size == crop
    assert model.vision.crop_tokens == tokens


def test_rope_parameters_of_newer_files():
    config = changed("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 7000})
    del config["text_config"]["rope_theta"]
    assert model_from_hf(config).text.rotary_base == 7000.0


def test_directory_with_added_tokens(tmp_path):
    config = copy.deepcopy(SMALL)
    del config["special_token_ids"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<im_patch>": 9, "<patch_start>": 61, "<other>": 3})
    )
    loaded = load_run(model_from=str(tmp_path))
    tokens = loaded.config.model.tokens
    assert (tokens.im_patch, tokens.patch_start, tokens.im_start) == (50, 61, 151680)
    assert loaded.config.model.text.vocab_size == 96
    assert loaded.origins["model.text.vocab_size"] == f"file {tmp_path / 'config.json'}"
    assert loaded.origins["model.freeze_decoder"] == "default"


def only(path: str, value: str, wanted: str) -> str:
    return f"{path} = {value}: only {wanted} is implemented; use a checkpoint with {wanted}"


REFUSED = [
    ("model_type", "llava", only("model_type", "llava", '"step_robotics"')),
    ("projector_bias", True, only("projector_bias", "true", "false")),
    ("tie_word_embeddings", True, only("tie_word_embeddings", "true", "false")),
    ("vision_select_layer", -2, only("vision_select_layer", "-2", "-1")),
    ("vision_config.hidden_act", "gelu", only("vision_config.hidden_act", "gelu", '"quick_gelu"')),
    ("vision_config.use_cls_token", True, only("vision_config.use_cls_token", "true", "false")),
    ("vision_config.ues_cls_token", True, only("vision_config.ues_cls_token", "true", "false")),
    ("vision_config.use_ln_pre", False, only("vision_config.use_ln_pre", "false", "true")),
    ("vision_config.use_ln_post", True, only("vision_config.use_ln_post", "true", "false")),
    ("vision_config.use_abs_posemb", False, only("vision_config.use_abs_posemb", "false", "true")),
    ("vision_config.use_rope2d", False, only("vision_config.use_rope2d", "false", "true")),
    ("vision_config.pool_type", "attn", only("vision_config.pool_type", "attn", '"none"')),
    ("vision_config.output_dim", 8, only("vision_config.output_dim", "8", "null")),
    ("text_config.model_type", "llama", only("text_config.model_type", "llama", '"qwen3"')),
    ("text_config.hidden_act", "gelu", only("text_config.hidden_act", "gelu", '"silu"')),
    ("text_config.attention_bias", True, only("text_config.attention_bias", "true", "false")),
    ("text_config.tie_word_embeddings", True, only("text_config.tie_word_embeddings", "true", "false")),
    ("text_config.use_sliding_window", True, only("text_config.use_sliding_window", "true", "false")),
    (
        "text_config.rope_scaling",
        {"type": "yarn"},
        "text_config.rope_scaling.factor = none: YaRN needs a factor greater than 1, or an original length below "
        'max_position_embeddings; give one or use "default"',
    ),
    (
        "text_config.layer_types",
        ["full_attention", "sliding_attention"],
        "text_config.layer_types = ['full_attention', 'sliding_attention']: "
        "only full_attention layers are implemented; use a checkpoint without sliding windows",
    ),
    (
        "text_config.rope_parameters",
        {"rope_type": "llama3"},
        'text_config.rope_parameters.rope_type = llama3: only "default" and "yarn" are implemented; use a checkpoint '
        "with one of the two",
    ),
    (
        "text_config.rope_parameters",
        {"rope_theta": 9},
        "text_config.rope_parameters.rope_theta = 9.0: differs from text_config.rope_theta = 5000.0; "
        "remove one of the two",
    ),
    ("patch_token_len", 80, "patch_token_len = 80: must be a perfect square; e.g. 64 or 81"),
    (
        "image_token_len",
        9,
        "image_token_len = 9: image_size 112 with patch_size 14 gives a grid of 8 x 8, downsampled 2 x "
        "2 = 4 tokens; "
        "set image_token_len 4 or correct image_size",
    ),
    (
        "image_token_id",
        49,
        "special_token_ids.im_patch = 50: differs from image_token_id = 49; make the two equal",
    ),
    ("vision_config", 3, "vision_config = 3: must be an object; correct the file"),
    ("text_config.hidden_size", "wide", "text_config.hidden_size = wide: must be a whole number; got a str"),
    (
        "text_config.num_hidden_layers",
        0,
        "text_config.num_hidden_layers = 0: must be at least 1; change the value",
    ),
    (
        "text_config.rms_norm_eps",
        -1e-6,
        "text_config.rms_norm_eps = -1e-06: must be greater than 0; change the value",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_refused(path, value, message):
    with pytest.raises(ConfigErrors) as caught:
        model_from_hf(changed(path, value))
    assert message in [str(problem) for problem in caught.value.problems]


def test_an_unknown_special_token_is_refused():
    with pytest.raises(
        ConfigErrors, match=r"special_token_ids.im_pach = 3: unknown token; the tokens are endoftext"
    ):
        model_from_hf(changed("special_token_ids", {"im_pach": 3}))


@pytest.mark.parametrize(("content", "rule"), [("{", "is not JSON"), ("[1]", "must hold a JSON object")])
def test_broken_files(tmp_path, content, rule):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigErrors, match=rule):
        model_from_hf(tmp_path)


def test_every_problem_at_once():
    config = changed("vision_config.hidden_act", "gelu")
    config["text_config"]["attention_bias"] = True
    config["patch_token_len"] = 2
    with pytest.raises(ConfigErrors) as caught:
        model_from_hf(config)
    assert len(caught.value.problems) == 3
