"""A tiny checkpoint directory in the released layout, tokenizer and chat template included, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.checkpoint.initialize import FreshWeights
from megatron_vl.config.hf_config import TOKEN_TEXTS
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.data.batch import MicroBatch

MODEL = STEP3_VL_TINY
IDS = {text: getattr(MODEL.tokens, name) for text, name in TOKEN_TEXTS.items()}
ENDS = [MODEL.tokens.endoftext, MODEL.tokens.chat_end, MODEL.tokens.im_patch]
INDEX = "model.safetensors.index.json"

CHAT_TEMPLATE = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}\
<im_patch>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def config_json() -> dict:
    vision, text = MODEL.vision, MODEL.text
    return {
        "architectures": ["StepVLForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_step_vl.StepRoboticsConfig",
            "AutoModelForCausalLM": "modeling_step_vl.Step3VL10BForCausalLM",
        },
        "model_type": "step_robotics",
        "image_token_len": vision.global_tokens,
        "patch_token_len": vision.crop_tokens,
        "image_token_id": MODEL.tokens.im_patch,
        "understand_projector_stride": 2,
        "projector_bias": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_layers,
            "heads": vision.num_attention_heads,
            "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size,
            "hidden_act": "quick_gelu",
        },
        "text_config": {
            "bos_token_id": MODEL.tokens.endoftext,
            "eos_token_id": ENDS,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_query_groups,
            "head_dim": text.kv_channels,
            "intermediate_size": text.ffn_hidden_size,
            "vocab_size": text.vocab_size,
            "rope_theta": text.rotary_base,
            "tie_word_embeddings": False,
        },
    }


def tokenizer_json() -> dict:
    """Bytes as text tokens 0..255, and the special tokens under the model's ids."""
    vocabulary = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    added = [
        {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for text, number in IDS.items()
    ]  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": plain,
        "decoder": plain,
        "model": {"type": "BPE", "vocab": {**vocabulary, **IDS}, "merges": []},
    }


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def edit_json(path: Path, section: str = "", **changes: object) -> None:
    """Sets keys of a JSON file, at its root or in a section."""
    content = json.loads(path.read_text())
    (content[section] if section else content).update(changes)
    write_json(path, content)


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two shards and their index."""
    names = sorted(tensors)
    shards = {
        "model-00001.safetensors": names[: len(names) // 2],
        "model-00002.safetensors": names[len(names) // 2 :],
    }
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def fresh_tensors() -> dict[str, torch.Tensor]:
    weights = FreshWeights(MODEL, seed=3)
    return {name: weights(name).bfloat16() for name in expected_tensors(MODEL)}


def write_release(folder: Path) -> Path:
    """Everything that tools/verify_release.py looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, fresh_tensors())
    write_json(folder / "config.json", config_json())
    write_json(
        folder / "generation_config.json",
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "eos_token_id": ENDS},
    )
    write_json(folder / "added_tokens.json", IDS)
    decoder = {str(number): {"content": text, "special": True} for text, number in IDS.items()}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    write_json(folder / "tokenizer.json", tokenizer_json())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def logits_on_rank(model: ModelConfig, directory: Path, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """[S, vocabulary] of each batch by a rank of a `LocalWorld`, for the stand-in of a release's code."""
    from megatron_vl.checkpoint.hf_load import HFCheckpoint
    from megatron_vl.config.schema import ParallelConfig, PrecisionConfig, RunConfig
    from megatron_vl.parallel.runtime import choose_device, start
    from megatron_vl.train.build import build
    from megatron_vl.train.step import stage_inputs

    config = RunConfig(
        model=model, parallel=ParallelConfig(device="cpu"), precision=PrecisionConfig(params="fp32")
    )
    device = choose_device("cpu")
    runtime = start(config.parallel, 1, device)
    chunk = build(config, runtime, HFCheckpoint(directory).tensor, with_optimizer=False).chunks[0].module
    with torch.no_grad():
        return [chunk.logits(stage_inputs(batch, device))[:, 0].clone() for batch in batches]
