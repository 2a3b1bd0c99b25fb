"""Combinations that cannot be carried out, with the exact message of each."""

import pytest

from megatron_vl.config.load import load_run
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.presets import PRESETS
from megatron_vl.errors import ConfigErrors
from megatron_vl.plan.checks import check_model, check_ready_to_train, check_run, load_checked_run

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"

# Overrides on the tiny preset (world size 0: the smallest), and every problem they cause.
BAD = [
    (
        "parallel.overlap_param_gather=true parallel.use_distributed_optimizer=false",
        0,
        [
            "parallel.overlap_param_gather = true: gathers what parallel.use_distributed_optimizer has sharded, but "
            "that is false; set use_distributed_optimizer true, or leave this key out"
        ],
    ),
    (
        "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=false",
        0,
        [
            "parallel.overlap_param_gather = true: works in the buckets of parallel.overlap_grad_reduce, which is "
            "false; leave one of the two out"
        ],
    ),
    (
        "parallel.tensor_model_parallel_size=3 model.text.num_query_groups=2",
        0,
        [
            "parallel.tensor_model_parallel_size = 3: must divide model.text.num_attention_heads = 4; "
            "choose one of 1, 2, 4",
            "parallel.tensor_model_parallel_size = 3: must divide model.text.ffn_hidden_size = 256; "
            "choose one of 1, 2, 4",
            "parallel.tensor_model_parallel_size = 3: must be a divisor or a multiple of "
            "model.text.num_query_groups = 2 "
            "(Megatron-Core's rule); choose another size",
        ],
    ),
    (
        f"{TP2} parallel.vision_placement=tensor model.vision.num_attention_heads=1 "
        f"model.vision.ffn_hidden_size=175",
        0,
        [
            "parallel.tensor_model_parallel_size = 2: must divide model.vision.num_attention_heads = 1 with "
            'parallel.vision_placement "tensor" ("data" has no such rule); choose one of 1',
            "parallel.tensor_model_parallel_size = 2: must divide model.vision.ffn_hidden_size = 175 with "
            'parallel.vision_placement "tensor" ("data" has no such rule); choose one of 1',
        ],
    ),
    (
        "model.text.rope_scaling.kind=yarn model.text.rope_scaling.factor=2",
        0,
        [
            "model.text.rope_scaling.original_max_position_embeddings = none: is needed with kind = yarn; give the "
            "length that the weights were trained for, 65536 for the release",
        ],
    ),
    (
        "parallel.cp_comm_type=a2a parallel.context_parallel_size=4 parallel.layer_backend=torch",
        0,
        [
            "parallel.cp_comm_type = a2a: the torch layers exchange K and V by p2p or all_gather; use one of the two, "
            "or parallel.layer_backend transformer_engine",
            "parallel.cp_comm_type = a2a: shares heads out over context_parallel_size 4, which must divide the 2 "
            "key-value heads of a tensor-parallel rank; use p2p, or smaller sizes",
        ],
    ),
    (
        "parallel.cp_comm_type=all_gather parallel.context_parallel_size=2 "
        "parallel.layer_backend=transformer_engine data.packing.enabled=true data.packing.pad_multiple=4",
        0,
        [
            "parallel.cp_comm_type = all_gather: Transformer Engine 2.11 takes packed rows (thd) with p2p only; use "
            "p2p, or parallel.layer_backend torch with all_gather",
        ],
    ),
    (
        "parallel.flash_attention=fa3 parallel.device=cpu",
        0,
        ["parallel.flash_attention = fa3: needs a CUDA device, but parallel.device = cpu; remove it"],
    ),
    (
        "parallel.flash_attention=fa4 parallel.layer_backend=transformer_engine",
        0,
        [
            "parallel.flash_attention = fa4: is for the torch layers; Transformer Engine chooses its kernels itself; "
            "remove it or set parallel.layer_backend torch"
        ],
    ),
    (
        "parallel.projector_kernel=implicit parallel.fused_kernels=never model.vision.hidden_size=256 "
        "model.vision.num_attention_heads=8",
        0,
        [
            "parallel.projector_kernel = implicit: is a fused kernel, but parallel.fused_kernels = never; remove one "
            "of the two"
        ],
    ),
    (
        f"parallel.projector_kernel=implicit model.vision.hidden_size=256 model.vision.num_attention_heads=8 {TP2} "
        "parallel.vision_placement=tensor parallel.tensor_model_parallel_size=4",
        0,
        [
            "parallel.projector_kernel = implicit: takes channels in multiples of 256, but a rank's convolutions have "
            "256 -> 128 -> 1024; use gather"
        ],
    ),
    (
        TP2,
        3,
        ["world size = 3: must be a multiple of TP2 x CP1 x PP1 = 2; start 2 or 4 ranks"],
    ),
    (
        "parallel.context_parallel_size=4",
        2,
        ["world size = 2: must be a multiple of TP1 x CP4 x PP1 = 4; start 4 ranks"],
    ),
    (
        "train.global_batch_size=7 train.micro_batch_size=2",
        2,
        [
            "train.global_batch_size = 7: must be a multiple of train.micro_batch_size 2 x 2 "
            "data-parallel replicas = 4; "
            "choose 4 or 8"
        ],
    ),
    (
        "train.global_batch_size=2",
        4,
        [
            "train.global_batch_size = 2: must be a multiple of train.micro_batch_size 1 x 4 "
            "data-parallel replicas = 4; "
            "choose 4"
        ],
    ),
    (
        "parallel.context_parallel_size=3",
        0,
        [
            "data.seq_length = 4096: must be a multiple of 2 x context_parallel_size 3 = 6; choose 4092 "
            "or 4098"
        ],
    ),
    (
        f"{TP2} parallel.sequence_parallel=true parallel.context_parallel_size=2 data.seq_length=4",
        0,
        [
            "data.seq_length = 4: must be a multiple of 2 x context_parallel_size 2 x "
            "tensor_model_parallel_size 2 "
            "(sequence_parallel) = 8; choose 8"
        ],
    ),
    (
        "parallel.sequence_parallel=true",
        0,
        [
            "parallel.sequence_parallel = true: has nothing to shard with "
            "parallel.tensor_model_parallel_size = 1; "
            "set it false, or parallel.tensor_model_parallel_size to 2 or more"
        ],
    ),
    (
        "parallel.virtual_pipeline_model_parallel_size=2",
        0,
        [
            "parallel.virtual_pipeline_model_parallel_size = 2: interleaving needs "
            "parallel.pipeline_model_parallel_size of at least 2; remove it or use more stages"
        ],
    ),
    (
        f"{PP2} parallel.virtual_pipeline_model_parallel_size=2 train.global_batch_size=3",
        0,
        [
            "train.global_batch_size = 3: gives 3 micro-batches per step; the interleaved schedule "
            "needs a multiple of "
            "parallel.pipeline_model_parallel_size = 2; choose a multiple of 2"
        ],
    ),
    (
        f"{PP2} parallel.pipeline_decoder_layers=[1,2]",
        0,
        [
            "parallel.pipeline_decoder_layers = [1, 2]: sums to 3, but the decoder has 4 layers; make "
            "the sum 4"
        ],
    ),
    (
        "parallel.pipeline_model_parallel_size=7",
        0,
        [
            "model.text.num_layers = 4: too few layers for the 7 stages of pipeline_model_parallel_size 7: "
            "only the first and the last stage may go without; use at most 6 stages"
        ],
    ),
    (
        "parallel.device=cpu parallel.layer_backend=transformer_engine",
        0,
        [
            "parallel.layer_backend = transformer_engine: needs a CUDA device, but parallel.device = cpu; "
            "set parallel.layer_backend torch"
        ],
    ),
    (
        "data.image_backend=dali data.dali_device=mixed parallel.device=cpu",
        0,
        [
            "data.dali_device = mixed: decodes JPEG by nvJPEG, which rounds otherwise than the released "
            "processing, so it keeps the tolerance of data.image_mode = fast only; set data.image_mode=fast, "
            "or data.dali_device=cpu",
            "data.dali_device = mixed: decodes on a GPU, but parallel.device = cpu; set data.dali_device=cpu, "
            "or parallel.device=cuda",
        ],
    ),
    (
        "train.train_steps=3 train.train_tokens=5",
        0,
        ["train.train_tokens = 5: stands beside train.train_steps = 3; keep one of the two"],
    ),
    (
        "schedule.phases=[{tokens: 5, lr_start: 1, lr_end: 0, style: constant}] schedule.warmup_tokens=6",
        0,
        [
            "schedule.phases[0].lr_end = 0.0: differs from lr_start = 1.0 in a constant phase; "
            "make them equal or choose linear",
            "schedule.warmup_tokens = 6: is longer than the first phase of 5 tokens; "
            "shorten it or lengthen the phase",
        ],
    ),
    (
        "model.freeze_vision=true model.freeze_projector=true model.freeze_decoder=true",
        0,
        [
            "model.freeze_decoder = true: nothing is left to train: tower, projector and decoder are "
            "all frozen; "
            "unfreeze at least one of them"
        ],
    ),
    (
        "model.vision.num_attention_heads=5",
        0,
        [
            "model.vision.num_attention_heads = 5: must divide vision.hidden_size = 64; choose one of "
            "1, 2, 4, 8"
        ],
    ),
    (
        "model.vision.num_attention_heads=32",
        0,
        [
            "model.vision.num_attention_heads = 32: gives heads of 2 channels, but RoPE-2D needs a "
            "multiple of 4 "
            "(pairs on two axes); change the number of heads or vision.hidden_size"
        ],
    ),
    (
        "model.vision.crop_size=57",
        0,
        ["model.vision.crop_size = 57: must be a multiple of vision.patch_size = 14; choose 56 or 70"],
    ),
    (
        "model.text.num_query_groups=3",
        0,
        ["model.text.num_query_groups = 3: must divide text.num_attention_heads = 4; choose one of 1, 2, 4"],
    ),
    (
        "model.text.kv_channels=31",
        0,
        ["model.text.kv_channels = 31: must be even: RoPE turns pairs of channels; add one"],
    ),
]


def split_overrides(text: str) -> list[str]:
    """At blanks that begin a new `section.key=`."""
    parts: list[str] = []
    for word in text.split(" "):
        if "=" in word or not parts:
            parts.append(word)
        else:
            parts[-1] += " " + word
    return parts


@pytest.mark.parametrize(("overrides", "world_size", "messages"), BAD, ids=[row[0][:60] for row in BAD])
def test_bad_combination(overrides, world_size, messages):
    config = load_run(overrides=["preset=step3_vl_tiny", *split_overrides(overrides)]).config
    assert [str(problem) for problem in check_run(config, world_size or None)] == messages


@pytest.mark.parametrize(
    "overrides",
    [
        "parallel.tensor_model_parallel_size=4",  # two query groups, repeated
        f"{TP2} {PP2} parallel.sequence_parallel=true parallel.context_parallel_size=2 "
        f"parallel.vision_placement=tensor",
        f"{PP2} parallel.virtual_pipeline_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=6",
        f"{TP2} model.vision.num_attention_heads=1",  # placement data has no rule for the tower
        f"{PP2} model.freeze_decoder=true",
        "data.image_backend=dali",  # on the CPU its pixels are Pillow's
        "data.image_backend=dali data.image_mode=fast data.dali_device=mixed",
    ],
)
def test_good_combination(overrides):
    load_checked_run(overrides=["preset=step3_vl_tiny", *split_overrides(overrides)])


def test_presets_are_legal_and_the_tiny_one_halves():
    assert all(check_model(model) == [] for model in PRESETS.values())
    quickstart = ["preset=step3_vl_tiny", TP2, PP2, "parallel.vision_placement=tensor"]
    assert load_checked_run(overrides=quickstart, world_size=4).config.parallel.model_parallel_size == 4


def test_the_vision_placements_rule_for_the_release_up_to_tp8():
    for size in (2, 4, 8):
        load_checked_run(
            overrides=[f"parallel.tensor_model_parallel_size={size}", "parallel.vision_placement=tensor"]
        )


def test_token_ids_concern_training_only():
    overrides = ["preset=step3_vl_tiny", "model.tokens.im_patch=512", "model.tokens.im_start=502"]
    config = load_run(overrides=overrides).config
    assert check_run(config) == []
    assert [str(problem) for problem in check_ready_to_train(config)[:2]] == [
        "model.tokens.im_patch = 512: must be below model.text.vocab_size = 512; "
        "give the token an id of this vocabulary",
        "model.tokens.im_end = 502: is also the id of model.tokens.im_start; give every token its own id",
    ]


def test_what_training_needs(tmp_path):
    config = load_run(
        overrides=[
            "train.eval_interval=5",
            f"data.train=[{tmp_path}/none.jsonl]",
            "train.init_from_hf=/nowhere",
        ]
    ).config
    assert [str(problem) for problem in check_ready_to_train(config)] == [
        "data.tokenizer = '': no tokenizer; give a tokenizer.json or a SentencePiece .model",
        "schedule.phases = []: no learning rate; give at least one phase",
        "data.eval = []: no evaluation data, but train.eval_interval = 5; list a JSONL file or set "
        "train.eval_interval 0",
        f"data.train = {tmp_path}/none.jsonl: no such file; "
        "correct the path; relative paths start at the working directory",
        "train.init_from_hf = /nowhere: no such folder; correct the path; relative paths start at the "
        "working directory",
    ]


def test_a_training_run_reports_layout_and_data_together():
    with pytest.raises(ConfigErrors) as caught:
        load_checked_run(overrides=["train.global_batch_size=7"], world_size=2, to_train=True)
    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["train.global_batch_size", "data.train", "data.tokenizer", "schedule.phases"]


def test_the_default_model_is_the_release():
    assert load_checked_run().config.model == ModelConfig()


def test_dali_must_be_installed_where_it_is_asked_for(monkeypatch):
    config = load_run(overrides=["preset=step3_vl_tiny", "data.image_backend=dali"]).config
    monkeypatch.setattr("megatron_vl.plan.image_checks.dali_is_installed", lambda: False)
    said = [str(problem) for problem in check_ready_to_train(config) if problem.path == "data.image_backend"]
    assert said == [
        "data.image_backend = dali: NVIDIA DALI is not installed; pip install 'megatron-vl[dali]' "
        "(nvidia-dali-cuda130; runs on machines without a GPU too), or set data.image_backend=torch"
    ]
    assert check_run(config) == []  # a run may be described where it is not run
