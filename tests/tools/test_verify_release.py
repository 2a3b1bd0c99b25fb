"""tools/verify_release.py on a tiny directory in the released layout: all ok, every planted fault found.

The release itself was not at hand: `--logits` is tested with a stand-in for its remote code.
"""

import builtins
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vl.checkpoint.release import (
    check_config,
    check_generation_config,
    check_tensors,
    check_tokens,
    expected_release,
)
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel.world import LocalWorld
from megatron_vl.parity import release_logits
from megatron_vl.parity.release_logits import (
    Options,
    check_logits,
    input_differences,
    logit_distance,
    our_inputs,
)
from megatron_vl.parity.release_template import check_template
from tests.tiny_release import (
    CHAT_TEMPLATE,
    INDEX,
    edit_json,
    fresh_tensors,
    logits_on_rank,
    tokenizer_json,
    write_json,
    write_release,
    write_weights,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "verify_release.py"
EXPECTED = expected_release("step3_vl_tiny")
NORM = "model.layers.1.self_attn.q_norm.weight"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("verify_release", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def release(tmp_path) -> Path:
    return write_release(tmp_path / "release")


def report(tool, capsys, *arguments) -> tuple[int, dict[str, dict]]:
    code = tool.main([*map(str, arguments), "--json"])
    return code, {check["name"]: check for check in json.loads(capsys.readouterr().out)}


def test_a_good_release(tool, release, capsys):
    code, checks = report(tool, capsys, release, "--model-from", "step3_vl_tiny")
    assert code == 0
    assert {name: check["status"] for name, check in checks.items()} == {
        "tensors": "ok", "config": "ok", "generation_config": "ok", "tokens": "ok", "template": "ok",
        "logits": "skipped",
    }  # fmt: skip
    assert checks["tensors"]["summary"].startswith("98 tensors, 1,")
    assert checks["template"]["summary"].endswith("and their ids by tokenizer.json")
    assert checks["template"]["notes"] == [
        "the template asks for an answer with '<|im_start|>assistant\\n<think>\\n'"
    ]
    assert checks["logits"]["summary"] == "not asked for: --logits"


def test_as_a_command_against_the_10b_preset(release):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(release)], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 1 and not done.stderr
    assert "expected 1,066 tensors, 10,171,750,144 parameters" in done.stdout
    assert "\nconfig            differs  " in done.stdout
    assert "  - vision_config.width: gives vision.hidden_size = 64, expected 1536" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["/nowhere"], "/nowhere: no such folder"),
        (
            [".", "--model-from", "tiny"],
            "--model-from = tiny: neither a preset (step3_vl_10b, step3_vl_tiny) nor a",
        ),
        ([".", "--images", "none.png"], "no such file: none.png"),
    ],
)
def test_bad_commands(tool, capsys, arguments, error):
    assert tool.main(arguments) == 2
    assert error in capsys.readouterr().err


def test_the_model_may_come_from_a_folder(release):
    expected = expected_release(str(release))
    assert expected.model == EXPECTED.model and expected.dtype == "BF16"
    edit_json(release / "config.json", torch_dtype="float32")
    assert expected_release(str(release)).dtype == "F32"


def test_every_difference_of_the_tensors_is_listed(release):
    tensors = fresh_tensors()
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.zeros(2)
    tensors[NORM] = torch.ones(8, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    tensors["vit_large_projector.weight"] = tensors["vit_large_projector.weight"].to(torch.int8)
    write_weights(release, tensors)
    content = json.loads((release / INDEX).read_text())
    shard = content["weight_map"].pop("model.embed_tokens.weight")
    write_json(release / INDEX, {**content, "metadata": {"total_size": 5}})
    check = check_tensors(release, EXPECTED)
    assert check.status == "differs"
    assert check.differences[:-1] == [
        "dtype: vit_large_projector.weight is I8, expected one of F32, BF16, F16, F64",
        "missing: model.embed_tokens.weight [512, 128]",
        "missing: model.norm.weight [128]",
        f"not in the index: model.embed_tokens.weight in {shard}",
        f"shape: {NORM} is [8], the model wants [32]",
        "unexpected: model.extra",
        "dtype: lm_head.weight is F32, the release has BF16",
        "dtype: vit_large_projector.weight is I8, the release has BF16",
    ]
    assert check.differences[-1].startswith(f"total_size: {INDEX} declares 5 bytes, its tensors have ")


def test_differences_of_the_config(release):
    path = release / "config.json"
    edit_json(path, understand_projector_stride=4, patch_token_len=4, novelty=[1])
    edit_json(path, "vision_config", width=32, layer_norm_eps=1e-6)
    edit_json(path, "text_config", rope_theta=1e4, eos_token_id=[1], num_key_value_heads=4)
    check = check_config(release, EXPECTED)
    assert check.differences == [
        "patch_token_len: gives vision.crop_size = 112, expected 56",
        "vision_config.width: gives vision.hidden_size = 32, expected 64",
        "vision_config.mlp_ratio: gives vision.ffn_hidden_size = 88, expected 176",
        "vision_config.layer_norm_eps: gives vision.layernorm_epsilon = 1e-06, expected 1e-05",
        "text_config.num_key_value_heads: gives text.num_query_groups = 4, expected 2",
        "text_config.rope_theta: gives text.rotary_base = 10000.0, expected 1000000.0",
        "understand_projector_stride = 4, the release has 2",
        "text_config.eos_token_id = [1], the release has [490, 492, 500]",
    ]
    assert check.notes[0] == "unknown field: novelty = [1]"
    assert check.notes[1].startswith(
        "left out, so the released values are assumed: vision_config.ls_init_value, "
    )
    edit_json(path, "vision_config", hidden_act="gelu", width=64)
    assert check_config(release, EXPECTED).differences == [
        'vision_config.hidden_act = gelu: only "quick_gelu" is implemented; use a checkpoint with '
        '"quick_gelu"'
    ]
    path.unlink()
    assert (
        "config.json: cannot be read (No such file or directory)"
        in check_config(release, EXPECTED).differences[0]
    )


def test_differences_of_the_token_ids(release):
    edit_json(release / "added_tokens.json", **{"<im_patch>": 501})
    tokenizer = tokenizer_json()
    tokenizer["added_tokens"] = [
        token for token in tokenizer["added_tokens"] if token["content"] != "<think>"
    ]
    write_json(release / "tokenizer.json", tokenizer)
    write_json(release / "tokenizer_config.json", {})
    assert check_tokens(release, EXPECTED).differences == [
        "added_tokens.json: <im_patch> has id 501, expected 500",
        "tokenizer_config.json: is not in the expected form (KeyError: 'added_tokens_decoder')",
        "tokenizer.json: <think> has id none, expected 495",
    ]
    edit_json(release / "generation_config.json", eos_token_id=490, top_k=20)
    assert check_generation_config(release, EXPECTED).differences == [
        "top_k = 20, the release has 0",
        "eos_token_id = 490, the release has [490, 492, 500]",
    ]
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        (release / name).unlink()
    assert (
        check_tokens(release, EXPECTED).status
        == check_generation_config(release, EXPECTED).status
        == "skipped"
    )


def test_a_template_with_another_text_gives_a_diff(release):
    path = release / "chat_template.jinja"
    path.write_text(CHAT_TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}"))
    (difference,) = check_template(release, EXPECTED).differences
    lines = [line.strip() for line in difference.splitlines()]
    assert lines[0] == "spaces:" and r"-'How many?<|im_end|>\n'" in lines and r"+'  How many?\n'" in lines
    path.unlink()
    assert check_template(release, EXPECTED).status == "skipped"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    edit_json(release / "tokenizer_config.json", chat_template=named)
    assert check_template(release, EXPECTED).status == "ok"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% if %}", "the chat template is not jinja2 ("),
        (
            "{{ ''.__class__.__mro__ }}",
            "SecurityError: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('no images') }}", "TemplateError: no images"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_templates_are_foreign_programs(release, template, error):
    (release / "chat_template.jinja").write_text(template)
    check = check_template(release, EXPECTED)
    assert check.status == "differs" and error in check.differences[0]


def test_text_that_is_equal_but_gives_other_ids(release):
    tokenizer = tokenizer_json()
    tokenizer["model"]["vocab"]["user"] = 300
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 300, "content": "user", "special": False}
    )
    write_json(release / "tokenizer.json", tokenizer)
    assert check_template(release, EXPECTED).status == "ok"  # a text token for both
    tokenizer["added_tokens"][-1]["special"] = True
    write_json(release / "tokenizer.json", tokenizer)
    assert (
        check_template(release, EXPECTED)
        .differences[0]
        .startswith("one turn: ids differ from number 1 on: [300, ")
    )


def test_without_jinja2(release, monkeypatch):
    def no_jinja2(name, *arguments, real=builtins.__import__, **more):
        if name == "jinja2":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", no_jinja2)
    check = check_template(release, EXPECTED)
    assert (check.status, check.summary) == ("skipped", "jinja2 is not installed: pip install jinja2")


def test_logits_are_refused_for_a_reason(tool, release, capsys, monkeypatch):
    (release / "modeling_step_vl.py").write_text("raise SystemExit('must not run')")
    common = (release, "--model-from", "step3_vl_tiny", "--logits")
    code, checks = report(tool, capsys, *common)
    assert code == 0 and checks["logits"]["status"] == "skipped"
    assert checks["logits"]["summary"] == (
        "needs --trust-remote-code, which runs the Python files of the directory (modeling_step_vl.py) "
        "with your "
        "rights; read them first"
    )
    monkeypatch.setattr(release_logits.importlib.util, "find_spec", lambda name: None)
    _, checks = report(tool, capsys, *common, "--trust-remote-code")
    assert checks["logits"]["summary"].startswith(
        "transformers is not installed: pip install transformers==4.57.0"
    )
    # from here on as if transformers were there: these refusals come before it is imported
    monkeypatch.setattr(release_logits.importlib.util, "find_spec", lambda name: object())
    (release / "tokenizer.json").unlink()
    _, checks = report(tool, capsys, *common, "--trust-remote-code")
    assert checks["logits"]["summary"].startswith("no tokenizer.json: write one with")
    edit_json(release / "config.json", auto_map={"AutoModelForCausalLM": "someone/else--modeling.Model"})
    asked = Options(trust_remote_code=True)
    assert check_logits(release, EXPECTED, asked).summary == (
        "auto_map of config.json points to code outside the directory: someone/else--modeling.Model"
    )
    _, checks = report(tool, capsys, *common, "--trust-remote-code")
    assert checks["logits"]["summary"] == "differences in config come first"


def stand_in_inputs(image: Path, release: Path) -> dict[str, torch.Tensor]:
    """What the release's processor is believed to give."""
    batch = our_inputs(image, EXPECTED.model, release / "tokenizer.json")
    return {
        "input_ids": batch.input_ids.clone(),
        "pixel_values": batch.global_pixels.clone(),
        "patch_pixel_values": batch.crop_pixels.clone(),
    }


def test_inputs_of_the_two_are_compared(release, tmp_path):
    image = release_logits.draw_images(tmp_path, EXPECTED.model)[3]
    batch = our_inputs(image, EXPECTED.model, release / "tokenizer.json")
    assert batch.num_crops == 2 and batch.num_images == 1
    good = stand_in_inputs(image, release)
    assert input_differences(good, batch) == []
    wrong_ids = good["input_ids"].clone()
    wrong_ids[0, 7] = 3
    (text,) = input_differences({**good, "input_ids": wrong_ids}, batch)
    assert text.startswith(f"{wrong_ids.numel()} ids, ours {wrong_ids.numel()}, from number 7 on [3, ")
    crops = good["patch_pixel_values"]
    assert input_differences({**good, "patch_pixel_values": crops[:1]}, batch) == [
        "patch_pixel_values is [1, 3, 56, 56], ours [2, 3, 56, 56]"
    ]
    assert input_differences({**good, "patch_pixel_values": crops + 0.01}, batch) == [
        "patch_pixel_values differs by up to 1.0e-02, allowed is 2e-03"
    ]


def test_logits_of_a_stand_in(release, tmp_path):
    """In place of the release's code: our own logits, those of the second image 1% off."""
    (release / "modeling_step_vl.py").write_text("")
    drawn = release_logits.draw_images(tmp_path, EXPECTED.model)
    images = (drawn[3], drawn[0])
    batches = [our_inputs(image, EXPECTED.model, release / "tokenizer.json") for image in images]
    with LocalWorld(1) as world:
        (known,) = world.run(1, logits_on_rank, EXPECTED.model, release, batches)

    class StandIn:
        def __init__(self, directory: Path, dtype: torch.dtype, device: str):
            assert (directory, dtype, device) == (release, torch.float32, "cpu")
            self.answers = iter([known[0], known[1] * 1.01])

        def inputs(self, text: str, image: Path) -> dict[str, torch.Tensor]:
            assert text.count("<im_patch>") == 1
            return stand_in_inputs(image, release)

        def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return next(self.answers)

    asked = Options(images, trust_remote_code=True, dtype="fp32")
    check = check_logits(release, EXPECTED, asked, StandIn)
    assert check.notes[0].startswith("runs modeling_step_vl.py, SHA-256 e3b0c442")
    assert check.notes[1].startswith("drawn3_112x56.png: ") and " 2 crops, " in check.notes[1]
    assert check.notes[1].endswith(" same best token at 100.00% of the positions")
    (difference,) = check.differences
    assert difference.startswith("drawn0_56x37.png: ") and "logits relative L2 9.9e-03" in difference
    assert difference.endswith("allowed are 1e-03 and 99.90% in fp32")


def test_the_distance_of_logits():
    theirs = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert logit_distance(theirs, theirs) == (0.0, 1.0)
    distance, agreement = logit_distance(theirs.flip(1), theirs)
    assert distance == pytest.approx(2 / 26**0.5) and agreement == 0.0
    with pytest.raises(CheckpointError, match=r"logits of the release are \[2, 2\], ours \[1, 2\]"):
        logit_distance(theirs[:1], theirs)


def test_foreign_code_that_fails(release, tmp_path):
    def load(directory, dtype, device):
        raise RuntimeError("needs flash attention")

    asked = Options(tuple(release_logits.draw_images(tmp_path, EXPECTED.model)[:1]), trust_remote_code=True)
    check = check_logits(release, EXPECTED, asked, load)
    assert check.differences == ["the release's own code failed: RuntimeError: needs flash attention"]


REMOTE_CODE = {
    "configuration_step_vl.py": """
from transformers import PretrainedConfig

class StepRoboticsConfig(PretrainedConfig):
    model_type = "step_robotics"
""",
    # modules nested as in the release, made from the names in the index
    "modeling_step_vl.py": """
import json
import re
from types import SimpleNamespace

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from .configuration_step_vl import StepRoboticsConfig

class Step3VL10BForCausalLM(PreTrainedModel):
    config_class = StepRoboticsConfig

    def __init__(self, config):
        super().__init__(config)
        for name, shape in config.shapes.items():
            module, parts = self, name.split(".")
            for part in parts[:-1]:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(parts[-1], torch.nn.Parameter(torch.zeros(shape)))
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, pixel_values):
        embedding = self.model.language_model.embed_tokens.weight[input_ids]
        return SimpleNamespace(logits=embedding @ self.lm_head.weight.T + pixel_values.sum())
""",
    "processing_step3.py": """
import torch
from transformers import ProcessorMixin

class Step3VLProcessor(ProcessorMixin):
    def __init__(self):
        pass

    @classmethod
    def from_pretrained(cls, *arguments, **more):
        return cls()

    def __call__(self, text, images, return_tensors):
        assert return_tensors == "pt" and images[0].size == (56, 37)
        return {"input_ids": torch.tensor([[len(text[0]), 1]]), "pixel_values": torch.zeros(1, 3, 4, 4)}
""",
}


def test_remote_code_is_loaded_with_the_key_mapping(release, tmp_path, monkeypatch):
    """The loading itself, with transformers where it is installed: every flat name finds its nested place."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name, text in REMOTE_CODE.items():
        (release / name).write_text(text)
    nested = {}
    for name, tensor in fresh_tensors().items():
        for pattern, replacement in release_logits.KEY_MAPPING.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        nested[name] = list(tensor.shape)
    assert {name.split(".")[0] for name in nested} == {"model", "lm_head"}
    edit_json(release / "config.json", shapes=nested)
    write_json(
        release / "processor_config.json",
        {"auto_map": {"AutoProcessor": "processing_step3.Step3VLProcessor"}},
    )
    loaded = release_logits.RemoteRelease(release, torch.float32, "cpu")
    inputs = loaded.inputs("abc", release_logits.draw_images(tmp_path, EXPECTED.model)[0])
    weights = fresh_tensors()
    expected = weights["model.embed_tokens.weight"].float()[[3, 1]] @ weights["lm_head.weight"].float().T
    assert torch.allclose(loaded.logits(inputs), expected)
    edit_json(release / "config.json", shapes={**nested, "model.more": [2]})
    with pytest.raises(
        CheckpointError, match=r'did not take all weights: {"missing_keys": \["model.more"\]}'
    ):
        release_logits.RemoteRelease(release, torch.float32, "cpu")
