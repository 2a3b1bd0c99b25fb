"""Loading: precedence, origins, number notations, round trip."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vl.config.dump import to_mapping, to_yaml
from megatron_vl.config.load import leaf_paths, load_run
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import LrPhase, RunConfig
from megatron_vl.errors import ConfigErrors


@pytest.fixture
def write(tmp_path):
    def write_file(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def test_defaults_are_the_released_model():
    loaded = load_run()
    assert loaded.config == RunConfig()
    assert loaded.config.model == PRESETS["step3_vl_10b"]
    assert set(loaded.origins.values()) == {"default"}
    assert list(loaded.origins) == list(leaf_paths(RunConfig))


def test_precedence_and_origins(write):
    path = write("preset: step3_vl_tiny\nmodel: {text: {num_layers: 6, vocab_size: 600}}\ntrain: {seed: 5}\n")
    loaded = load_run(path, ["model.text.vocab_size=640", "train.seed=7", "train.seed=8"])
    text = loaded.config.model.text
    assert (text.hidden_size, text.num_layers, text.vocab_size, loaded.config.train.seed) == (128, 6, 640, 8)
    origins = {
        name: loaded.origins[f"model.text.{name}"] for name in ("hidden_size", "num_layers", "vocab_size")
    }
    assert origins == {
        "hidden_size": "preset step3_vl_tiny",
        "num_layers": f"file {path}",
        "vocab_size": "command line",
    }
    assert loaded.origins["model.freeze_vision"] == "default"


def test_preset_on_the_command_line_wins(write):
    loaded = load_run(write("preset: step3_vl_10b"), ["preset=step3_vl_tiny"])
    assert loaded.config.model == PRESETS["step3_vl_tiny"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-5", 5e-5), ("1E-4", 1e-4), ("0.1", 0.1), ("2", 2.0), ("1_000.5", 1000.5), ("'3e-4'", 3e-4)],
)
def test_float_notations(write, text, value):
    optim = load_run(write(f"optim: {{weight_decay: {text}}}")).config.optim
    assert optim.weight_decay == value and isinstance(optim.weight_decay, float)


@pytest.mark.parametrize(
    "text", ["900e9", "900_000_000_000", "900000000000", "9e11", "900000000000.0", "9.0e+11"]
)
def test_int_notations(write, text):
    from_file = load_run(write(f"train: {{train_tokens: {text}}}")).config.train.train_tokens
    from_line = load_run(overrides=[f"train.train_tokens={text}"]).config.train.train_tokens
    assert from_file == from_line == 900_000_000_000
    assert isinstance(from_file, int)


def test_large_whole_numbers_stay_exact():
    assert load_run(overrides=["train.train_tokens=1234567890123456789e1"]).config.train.train_tokens == (
        12345678901234567890
    )


@pytest.mark.parametrize("text", ["none", "None", "null", "~", ""])
def test_none(text):
    assert load_run(overrides=[f"data.max_crops={text}"]).config.data.max_crops is None


def test_optional_string():
    assert load_run(overrides=["train.init_from_hf=none"]).config.train.init_from_hf is None
    assert load_run(overrides=["train.init_from_hf=12"]).config.train.init_from_hf == "12"


def test_strings_on_the_command_line_are_taken_as_typed():
    data = load_run(overrides=["data.tokenizer=123: [x", "data.data_root=a=b"]).config.data
    assert (data.tokenizer, data.data_root) == ("123: [x", "a=b")


def test_lists_and_nested_dataclasses(write):
    path = write(
        "schedule:\n  phases:\n    - {tokens: 10, lr_start: 1e-3, lr_end: 0}\ndata: {train: [a, b]}\n"
    )
    config = load_run(path, ["parallel.pipeline_decoder_layers=[0, 3]", "data.eval=[c]"]).config
    assert config.schedule.phases == [LrPhase(tokens=10, lr_start=1e-3, lr_end=0.0, style="cosine")]
    assert config.schedule.total_tokens == 10
    assert (config.data.train, config.data.eval) == (["a", "b"], ["c"])
    assert config.parallel.pipeline_decoder_layers == [0, 3]


def test_a_section_on_the_command_line_merges():
    parallel = load_run(overrides=["parallel={device: cpu, context_parallel_size: 2}"]).config.parallel
    assert (parallel.device, parallel.context_parallel_size, parallel.layer_backend) == ("cpu", 2, "auto")


@pytest.mark.parametrize("text", ["", "# nothing\n", "data:\n", "train: {}\n"])
def test_empty_sections_change_nothing(write, text):
    assert load_run(write(text)).config == RunConfig()


def test_an_empty_section_after_a_preset_changes_nothing(write):
    assert load_run(write("preset: step3_vl_tiny\nmodel:\n")).config.model == PRESETS["step3_vl_tiny"]


def test_round_trip(write):
    config = load_run(
        overrides=[
            "preset=step3_vl_tiny",
            "schedule.phases=[{tokens: 900e9, lr_start: 5e-5, lr_end: 1e-5, style: linear}]",
            "data.train=[\"a: b.jsonl\", 'größe.jsonl']",
            "data.max_crops=none",
            "parallel.pipeline_decoder_layers=[1, 3]",
            "run_dir=2024-01-01",
        ]
    ).config
    assert load_run(write(to_yaml(config))).config == config
    assert to_mapping(config)["schedule"]["phases"][0]["style"] == "linear"


def test_yaml_merge_keys_still_work(write):
    text = "train: &base {seed: 3}\n"
    assert (
        load_run(write(text + "checkpoint:\n  <<: {save_interval: 2}\n")).config.checkpoint.save_interval == 2
    )


def test_all_errors_at_once_with_the_checks_of_the_rest():
    def checks(config):
        from megatron_vl.plan.checks import check_run

        return check_run(config, 3)

    with pytest.raises(ConfigErrors) as caught:
        load_run(
            overrides=["trian.seed=1", "data.seed=x", "parallel.tensor_model_parallel_size=3"], checks=checks
        )
    paths = [problem.path for problem in caught.value.problems]
    assert paths[:2] == ["trian", "data.seed"]
    assert "parallel.tensor_model_parallel_size" in paths[2:]


def test_no_follow_up_errors_of_a_refused_key():
    """A misspelt TP size leaves 1 behind; that sequence parallelism needs more is then no news."""
    from megatron_vl.plan.checks import load_checked_run

    with pytest.raises(ConfigErrors) as caught:
        load_checked_run(
            overrides=["parallel.tensor_model_paralel_size=2", "parallel.sequence_parallel=true"]
        )
    assert len(caught.value.problems) == 1


def test_every_key_says_what_it_is():
    def walk(cls):
        for field in dataclasses.fields(cls):
            assert len(field.metadata["doc"]) > 4, field.name
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
            if dataclasses.is_dataclass(default):
                walk(type(default))

    walk(RunConfig)
    walk(LrPhase)


def test_descriptions_need_no_torch():
    code = (
        "import sys; import megatron_vl, megatron_vl.errors, megatron_vl.config.load, "
        "megatron_vl.plan.command\n"
        "import megatron_vl.plan.sequence, megatron_vl.plan.vision_share, megatron_vl.__main__\n"
        "assert not {'torch', 'megatron', 'numpy', 'PIL'} & set(sys.modules), 'heavy import'"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
