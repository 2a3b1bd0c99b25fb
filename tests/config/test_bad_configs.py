"""Bad descriptions and the exact error of each: value, rule, remedy."""

import pytest

from megatron_vl.config.load import load_run
from megatron_vl.errors import ConfigErrors

PRECISION = (
    "params, fp8, fp8_format, fp8_vision, fp8_margin, fp8_amax_history_len, fp8_amax_compute_algo, "
    "num_layers_at_start_in_bf16, num_layers_at_end_in_bf16"
)
# YAML text -> the one problem, as shown.
BAD_FILES = {
    "paralel: {}": "paralel: unknown key; did you mean parallel?",
    "parallel: {tensor_model_parallel_sise: 2}": (
        "parallel.tensor_model_parallel_sise: unknown key; did you mean parallel.tensor_model_parallel_size?"
    ),
    "train: {seq_length: 8}": "train.seq_length: unknown key; did you mean data.seq_length?",
    "precision: {zzz: 1}": f"precision.zzz: unknown key; the keys here are {PRECISION}",
    "precision: {1: 1}": f"precision.1: unknown key; the keys here are {PRECISION}",
    "train: 5": "train = 5: must be a section of keys; write its keys indented below it",
    "train: {seed: [1]}": "train.seed = [1]: must be a whole number; got a list",
    "train: {seed: true}": "train.seed = true: must be a whole number; got a bool",
    "train: {seed: 1.5}": "train.seed = 1.5: must be a whole number; round it",
    "train: {seed: ten}": "train.seed = ten: must be a whole number; got a str",
    "train: {seed: .inf}": "train.seed = inf: must be a whole number; round it",
    "train: {seed: 1e999999999}": "train.seed = 1e999999999: must be a whole number; got a str",
    "train: {seed: }": (
        "train.seed = none: must be a whole number; give a value, or remove the key for its default"
    ),
    "train: {train_steps: x}": "train.train_steps = x: must be a whole number or none; got a str",
    "train: {global_batch_size: 0}": "train.global_batch_size = 0: must be at least 1; change the value",
    "train: {seed: -1}": "train.seed = -1: must be at least 0; change the value",
    "optim: {adam_eps: .nan}": "optim.adam_eps = nan: must be a finite number; change the value",
    "optim: {adam_eps: nan}": "optim.adam_eps = nan: must be a finite number; change the value",
    "optim: {adam_eps: 0}": "optim.adam_eps = 0: must be greater than 0; change the value",
    "optim: {adam_beta1: 1.0}": "optim.adam_beta1 = 1.0: must be less than 1; change the value",
    "optim: {weight_decay: -.inf}": "optim.weight_decay = -inf: must be a finite number; change the value",
    "optim: {weight_decay: yes}": "optim.weight_decay = true: must be a number; got a bool",
    "optim: {optimizer: adam}": "optim.optimizer = adam: must be one of adamw; did you mean adamw?",
    "recompute: {vision_chunk_views: 0}": (
        "recompute.vision_chunk_views = 0: must be at least 1; change the value"
    ),
    "parallel: {device: tpu}": "parallel.device = tpu: must be one of auto, cpu, cuda; did you mean cpu?",
    "parallel: {fused_kernels: fast}": (
        "parallel.fused_kernels = fast: must be one of auto, never, required; choose one of them"
    ),
    "parallel: {projector_kernel: implict}": (
        "parallel.projector_kernel = implict: must be one of gather, implicit; did you mean implicit?"
    ),
    "data: {alpha: 0}": 'data.alpha = 0: must be a string; put it in quotes: "0"',
    "generate: {kv_cache_gib: 0}": "generate.kv_cache_gib = 0: must be greater than 0; change the value",
    "generate: {max_rows: 0}": "generate.max_rows = 0: must be at least 1; change the value",
    "generate: {kv_cache: 4}": "generate.kv_cache: unknown key; did you mean generate.kv_cache_gib?",
    "run_dir: 2024-01-01": (
        'run_dir = datetime.date(2024, 1, 1): must be a string; put it in quotes: "2024-01-01"'
    ),
    "data: {train: a.jsonl}": (
        "data.train = a.jsonl: must be a list; write it as [a, b] or as lines that begin with '- '"
    ),
    "data: {train: [1]}": 'data.train[0] = 1: must be a string; put it in quotes: "1"',
    "data: {apply_exif: 1}": "data.apply_exif = 1: must be true or false; got an int",
    "parallel: {pipeline_decoder_layers: [1, -1]}": (
        "parallel.pipeline_decoder_layers[1] = -1: must be at least 0; change the value"
    ),
    "schedule: {phases: [{lr_start: 1, lr_end: 0}]}": (
        "schedule.phases[0].tokens: is required; add it: length of the phase in tokens"
    ),
    "schedule: {phases: [{tokens: 1, lr_start: 1, lr_end: 0, stile: cosine}]}": (
        "schedule.phases[0].stile: unknown key; did you mean schedule.phases[0].style?"
    ),
    "schedule: {phases: [3]}": (
        "schedule.phases[0] = 3: must be a section of keys; write its keys indented below it"
    ),
    "preset: step3_vl_11b": (
        "preset = step3_vl_11b: must be one of step3_vl_10b, step3_vl_tiny; did you mean step3_vl_10b?"
    ),
    "preset: step3_vl_10b\nmodel_from: x": "preset = step3_vl_10b: stands beside model_from = x; keep "
    "one of the two",
    "model_from: /nowhere": (
        "/nowhere/config.json: cannot be read (No such file or directory); "
        "give a folder in the released Hugging Face layout"
    ),
    "- a\n- b": "RUN: must hold sections of keys; see examples/pretrain/step3_vl_10b.yaml",
    "train:\n  seed: 1\n  seed: 2": "RUN:3: the key 'seed' is given twice; correct the file there",
    "train: {seed: 1\ndata: [": "RUN:2: expected ',' or '}', but got ':'; correct the file there",
    "run_dir: !!python/name:os.system x": (
        "RUN:1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'; "
        "correct the file there"
    ),
}

BAD_OVERRIDES = {
    "train.seed": (
        "command line = train.seed: is not of the form section.key=value; write e.g. "
        "train.global_batch_size=64"
    ),
    "=1": "command line = =1: is not of the form section.key=value; write e.g. train.global_batch_size=64",
    "train..seed=1": (
        "command line = train..seed=1: is not of the form section.key=value; write e.g. "
        "train.global_batch_size=64"
    ),
    "train.sede=1": "train.sede: unknown key; did you mean train.seed?",
    "train.seed=[": "train.seed = [: is not a YAML value; quote it for the shell, e.g. 'key=[1, 2]'",
    "train=1": "train = 1: must be a section of keys; write its keys indented below it",
    "data.seed.x=1": "data.seed = {'x': 1}: must be a whole number; got a section",
}


def the_problem(*arguments) -> str:
    with pytest.raises(ConfigErrors) as caught:
        load_run(*arguments)
    assert len(caught.value.problems) == 1, str(caught.value)
    return str(caught.value.problems[0])


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert the_problem(str(path)).replace(str(path), "RUN") == BAD_FILES[text]


@pytest.mark.parametrize("text", BAD_OVERRIDES)
def test_bad_override(text):
    assert the_problem(None, [text]) == BAD_OVERRIDES[text]


def test_missing_file(tmp_path):
    path = str(tmp_path / "none.yaml")
    assert (
        the_problem(path)
        == f"{path}: cannot be read (No such file or directory); give the path of a YAML file"
    )


def test_not_utf8(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"run_dir: \xff\xfe")
    assert the_problem(str(path)) == f"{path}: is not UTF-8 text; give the path of a YAML file"


def test_a_wrong_section_is_not_hidden_by_an_override(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: 5")
    assert the_problem(str(path), ["data.seed=1"]).startswith("data = 5: must be a section")


def test_all_errors_in_one_message(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("trian: {}\ndata: {seed: x}\n")
    with pytest.raises(ConfigErrors) as caught:
        load_run(str(path), ["optim.adam_eps=-1"])
    assert str(caught.value) == (
        "3 problems in the configuration:\n"
        "  trian: unknown key; did you mean train?\n"
        "  data.seed = x: must be a whole number; got a str\n"
        "  optim.adam_eps = -1: must be greater than 0; change the value"
    )
