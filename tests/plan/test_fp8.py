"""FP8: which layers, and every refusal with its exact words."""

from dataclasses import replace

import pytest

from megatron_vl.config.load import load_run
from megatron_vl.config.schema import PrecisionConfig
from megatron_vl.plan.checks import check_run
from megatron_vl.plan.fp8 import fp8_layers, refusal, transformer_config_fields

ON = "precision.fp8=tensorwise"
TORCH = "parallel.layer_backend=torch"
TP2 = "parallel.tensor_model_parallel_size=2"

BAD = [
    (
        "precision.fp8_vision=true",
        ["precision.fp8_vision = true: says nothing without precision.fp8; leave it out"],
    ),
    (
        "precision.num_layers_at_end_in_bf16=1",
        ["precision.num_layers_at_end_in_bf16 = 1: says nothing without precision.fp8; leave it out"],
    ),
    (
        f"{ON} precision.params=fp32",
        ["precision.fp8 = tensorwise: needs bf16 weights; set precision.params bf16"],
    ),
    (
        f"precision.fp8=blockwise {TORCH}",
        ["precision.fp8 = blockwise: the torch layers have one scale per tensor; use tensorwise or delayed"],
    ),
    (
        f"{ON} {TORCH} precision.num_layers_at_start_in_bf16=3 precision.num_layers_at_end_in_bf16=2",
        [
            "precision.num_layers_at_start_in_bf16 = 3: with num_layers_at_end_in_bf16 = 2 there are more than "
            "model.text.num_layers = 4; lower one of them, or set fp8 none"
        ],
    ),
    (
        "precision.fp8=delayed precision.num_layers_at_end_in_bf16=1",
        [
            "precision.num_layers_at_end_in_bf16 = 1: Megatron-Core has no bf16 layers beside delayed scaling on "
            "Transformer Engine; use tensorwise, or parallel.layer_backend torch"
        ],
    ),
    (
        f"{ON} precision.num_layers_at_end_in_bf16=2 parallel.pipeline_model_parallel_size=4",
        [
            "precision.num_layers_at_end_in_bf16 = 2: Megatron-Core allows as many as a pipeline stage has layers, 1; "
            "use at most 1, or parallel.layer_backend torch"
        ],
    ),
    (
        "precision.fp8=delayed precision.fp8_vision=true",
        [
            "precision.fp8_vision = true: with delayed, Transformer Engine's ranks agree on the largest values behind "
            "every pass of the tower, and a rank without images has none; use tensorwise, or parallel.layer_backend "
            "torch"
        ],
    ),
    (
        f"{ON} data.seq_length=72",
        [
            "data.seq_length = 72: precision.fp8 needs the tokens of a micro-batch on a rank, 72, to be a multiple of "
            "16; choose another, or fp8 none"
        ],
    ),
    (
        f"{ON} data.seq_length=80 {TP2} parallel.sequence_parallel=true",
        [
            "data.seq_length = 80: precision.fp8 needs the tokens of a micro-batch on a rank, 40, to be a multiple of "
            "16; choose another, or fp8 none"
        ],
    ),
    (
        f"{ON} model.text.ffn_hidden_size=264",
        [
            "model.text.ffn_hidden_size = 264: precision.fp8 needs a share of TP 1, 264, to be a multiple of 16; "
            "choose another, or fp8 none"
        ],
    ),
    (
        f"{ON} precision.fp8_vision=true model.vision.ffn_hidden_size=168",
        [
            "model.vision.ffn_hidden_size = 168: precision.fp8 needs a share of TP 1, 168, to be a multiple of 16; "
            "choose another, or fp8 none"
        ],
    ),
]


@pytest.mark.parametrize(("overrides", "messages"), BAD, ids=[row[0][:60] for row in BAD])
def test_bad_combination(overrides, messages):
    config = load_run(overrides=["preset=step3_vl_tiny", *overrides.split()]).config
    found = [str(problem) for problem in check_run(config)]
    assert found == messages


@pytest.mark.parametrize(
    "overrides",
    [
        ON,
        f"{ON} parallel.device=cpu precision.params=fp32",  # for checks
        f"precision.fp8=delayed {TORCH} precision.num_layers_at_end_in_bf16=1 precision.fp8_vision=true",
        f"precision.fp8=delayed {TP2}",
    ],
)
def test_good_combination(overrides):
    assert check_run(load_run(overrides=["preset=step3_vl_tiny", *overrides.split()]).config) == []


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_released_model_is_legal(size):
    keys = ["precision.fp8=tensorwise", "precision.fp8_vision=true", "parallel.vision_placement=tensor"]
    keys += [
        f"parallel.tensor_model_parallel_size={size}",
        f"parallel.sequence_parallel={str(size > 1).lower()}",
    ]
    assert check_run(load_run(overrides=keys).config) == []


REFUSALS = [
    ("tensorwise", "torch", (9, 0), (13, 0), None),
    ("tensorwise", "torch", (8, 9), (12, 4), None),
    ("delayed", "torch", None, None, None),
    ("blockwise", "transformer_engine", (9, 0), (12, 9), None),
    ("none", "torch", (7, 0), None, None),
    (
        "tensorwise",
        "torch",
        (8, 0),
        (13, 0),
        "needs compute capability 8.9 (Ada, Hopper) or newer, this GPU has",
    ),
    ("delayed", "transformer_engine", (8, 6), (13, 0), "this GPU has compute capability 8.6; use none"),
    (
        "blockwise",
        "torch",
        (9, 0),
        (13, 0),
        "the torch layers have one scale per tensor; use tensorwise or delayed",
    ),
    (
        "blockwise",
        "transformer_engine",
        (9, 0),
        (12, 8),
        "needs compute capability 9.0 and CUDA 12.9, this GPU has",
    ),
    (
        "blockwise",
        "transformer_engine",
        (8, 9),
        (13, 0),
        "compute capability 8.9 and CUDA is 13.0; use tensorwise",
    ),
]


@pytest.mark.parametrize(("kind", "backend", "capability", "cuda", "expected"), REFUSALS)
def test_devices(kind, backend, capability, cuda, expected):
    found = refusal(PrecisionConfig(fp8=kind), backend, capability, cuda)
    assert found is None if expected is None else expected in found and f"precision.fp8 = {kind}" in found


def test_layers():
    precision = PrecisionConfig(fp8="tensorwise", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
    layers = fp8_layers(precision, 6)
    assert layers.decoder == {1, 2, 3} and not layers.vision and not layers.recipe.delayed
    assert fp8_layers(PrecisionConfig(), 6) is None
    whole = fp8_layers(replace(precision, num_layers_at_start_in_bf16=6, num_layers_at_end_in_bf16=0), 6)
    assert whole.decoder == frozenset()
    assert transformer_config_fields(PrecisionConfig(fp8_format="e4m3")) == {}
