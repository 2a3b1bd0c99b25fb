"""The description of a run, section by section. YAML keys are the attribute names.

`RunConfig()` is a legal description of the released 10B model with neutral training settings. Rules that
concern one key stand beside it and are checked on loading; rules between keys are in `plan/checks.py`.
Parallel keys carry Megatron's names.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.key import key
from megatron_vl.config.mixture import DomainConfig, MixturePhase, PackingConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.rl import RlConfig


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is cut over ranks. The data-parallel size follows from the world size."""

    tensor_model_parallel_size: int = key("ranks that share every matrix product", 1, at_least=1)
    pipeline_model_parallel_size: int = key("ranks that hold consecutive layers", 1, at_least=1)
    virtual_pipeline_model_parallel_size: int | None = key(
        "chunks of layers per pipeline rank (interleaved schedule); none = one", None, at_least=1
    )
    context_parallel_size: int = key("ranks that share the tokens of a row", 1, at_least=1)
    cp_comm_type: str = key(
        "how context parallelism exchanges K and V: p2p = in a ring, all_gather = all at once, a2a = heads for "
        "tokens (transformer_engine only)",
        "p2p",
        choices=("p2p", "all_gather", "a2a"),
    )
    sequence_parallel: bool = key("shard norms and residuals over the tensor-parallel ranks by token", False)
    pipeline_decoder_layers: list[int] | None = key(
        "decoder layers of each virtual stage in pipeline order; none = balanced by the plan",
        None,
        at_least=0,
    )
    vision_placement: str = key(
        "data: views are shared out over TP x CP, every rank of the first stage with the whole tower; tensor: the "
        "tower is sharded over TP; all: the views of a whole step over TP x CP x PP, encoded before the pipeline",
        "data",
        choices=("data", "tensor", "all"),
    )
    use_distributed_optimizer: bool = key("shard optimizer state and fp32 weights over DP x CP", True)
    overlap_grad_reduce: bool | None = key(
        "sum gradients over DP x CP beside the backward pass; none = on cuda", None
    )
    overlap_param_gather: bool | None = key(
        "gather updated weights beside the next forward pass; none = on cuda with use_distributed_optimizer",
        None,
    )
    ddp_bucket_size: int | None = key(
        "elements of a bucket of gradients, with overlap_grad_reduce; none = 40M, or 1M per DP x CP rank if that is "
        "more",
        None,
        at_least=1,
    )
    device: str = key("where to run; auto = cuda when there is one", "auto", choices=("auto", "cpu", "cuda"))
    layer_backend: str = key(
        "who supplies the layers; auto = transformer_engine on cuda when installed",
        "auto",
        choices=("auto", "torch", "transformer_engine"),
    )
    flash_attention: str = key(
        "flash attention of the torch layers on cuda: PyTorch's own, or an installed flash-attn 3 or 4",
        "built_in",
        choices=("built_in", "fa3", "fa4"),
    )
    fused_kernels: str = key(
        "kernels of csrc/ in the vision part: auto = on Hopper GPUs where they are built; required = or refuse to run",
        "auto",
        choices=("auto", "never", "required"),
    )
    projector_kernel: str = key(
        "the projector's convolutions among fused kernels: windows gathered for the library's products, or implicit "
        "products",
        "gather",
        choices=("gather", "implicit"),
    )
    norms: str = key(
        "norms of the torch layers: PyTorch's or NVIDIA Apex's; auto = Apex's if PyTorch has no fused one",
        "auto",
        choices=("auto", "torch", "apex"),
    )
    timeout_seconds: int = key(
        "how long a collective may wait before the run ends with an error", 600, at_least=1
    )

    @property
    def chunks_per_stage(self) -> int:
        """Model chunks on each pipeline rank, 1 without interleaving."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP x CP x PP."""
        return (
            self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size
        )


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats."""

    params: str = key(
        "weights and compute; auto = bf16 on cuda, fp32 on cpu", "auto", choices=("auto", "fp32", "bf16")
    )
    fp8: str = key(
        "products of the decoder's layers in FP8, scaled by: tensorwise = the tensor itself; delayed = earlier steps; "
        "blockwise = blocks of it (transformer_engine only)",
        "none",
        choices=("none", "tensorwise", "delayed", "blockwise"),
    )
    fp8_format: str = key(
        "hybrid = e4m3, gradients e5m2; e4m3 = e4m3 alone", "hybrid", choices=("hybrid", "e4m3")
    )
    fp8_vision: bool = key("products of the tower's blocks in FP8 as well", False)
    fp8_margin: int = key("delayed: powers of two that scales are lowered by", 0, at_least=0)
    fp8_amax_history_len: int = key(
        "delayed: how many largest values are remembered, one for each step (transformer_engine: micro-batch)",
        1024,
        at_least=1,
    )
    fp8_amax_compute_algo: str = key(
        "delayed: which of the remembered values counts", "max", choices=("max", "most_recent")
    )
    num_layers_at_start_in_bf16: int = key("first decoder layers without FP8", 0, at_least=0)
    num_layers_at_end_in_bf16: int = key("last decoder layers without FP8", 0, at_least=0)


@dataclass(frozen=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass instead of kept; tower and decoder apart."""

    decoder: str = key(
        "none; selective = core attention only; full = whole layers",
        "none",
        choices=("none", "selective", "full"),
    )
    decoder_num_layers: int = key("layers per recomputed group, for full", 1, at_least=1)
    offload: bool = key("what decoder layers keep waits in host memory for the backward pass", False)
    vision: str = key("none; full = whole blocks of the tower", "none", choices=("none", "full"))
    vision_num_layers: int = key("blocks per recomputed group, for full", 1, at_least=1)
    vision_chunk_views: int | None = key(
        "views that the tower encodes at once; each chunk is computed again in the backward pass, so that the "
        "activations of one chunk are alive; none = all views, kept",
        None,
        at_least=1,
    )


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they become rows and views. Relative paths: from the working folder."""

    train: list[str] = key("JSONL files of training conversations", factory=list)
    eval: list[str] = key("JSONL files of held-out conversations", factory=list)
    data_root: str = key("folder that image paths are relative to and may not leave", ".")
    seq_length: int = key("tokens per row", 4096, at_least=1)
    seed: int = key("seed of the sample order", 1234, at_least=0)
    tokenizer: str = key("tokenizer.json, or a SentencePiece .model", "")
    loss_on: str = key(
        "which tokens are learnt: every assistant turn, the last one, or all text",
        "assistant",
        choices=("assistant", "assistant_last", "all_text"),
    )
    boundary_rule: str = key(
        "is an image whose longer side equals the global view small (le) or large (lt, newer vLLM)",
        "le",
        choices=("le", "lt"),
    )
    image_mode: str = key(
        "exact: pixels of the released processing in float; fast: in 8 bits, within 2.2 grey levels of it",
        "exact",
        choices=("exact", "fast"),
    )
    image_backend: str = key(
        "who decodes: torch (Pillow), or dali (NVIDIA DALI, to be installed)",
        "torch",
        choices=("torch", "dali"),
    )
    dali_device: str = key(
        "where dali decodes: mixed = on this rank's GPU; auto = mixed where there is one and image_mode is fast",
        "auto",
        choices=("auto", "cpu", "mixed"),
    )
    alpha: str = key(
        "transparent images: laid over white, or alpha dropped", "white", choices=("white", "drop")
    )
    max_crops: int | None = key("images with more crops are refused; none = no limit", 36, at_least=0)
    max_aspect_ratio: float | None = key(
        "images that are longer are refused; none = no limit", None, at_least=1
    )
    apply_exif: bool = key("apply the EXIF orientation before anything else", True)
    max_image_pixels: int = key("images with more pixels are refused unread", 178_956_970, at_least=1)
    num_workers: int = key("loading processes per rank; 0 = load in the training process", 1, at_least=0)
    prefetch: int = key("micro-batches that each worker prepares ahead", 2, at_least=1)
    domains: list[DomainConfig] = key("domains of the training data; empty = data.train is one", factory=list)
    mixture: list[MixturePhase] = key("phases of the mixture; empty = one without end", factory=list)
    packing: PackingConfig = key("several documents in one row", factory=PackingConfig)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Learning rates are in `schedule`."""

    optimizer: str = key("update rule", "adamw", choices=("adamw",))
    adam_beta1: float = key("decay of the gradient average", 0.9, at_least=0, below=1)
    adam_beta2: float = key("decay of the squared-gradient average", 0.95, at_least=0, below=1)
    adam_eps: float = key("added to the root of the second moment", 1e-8, above=0)
    weight_decay: float = key("decoupled weight decay of matrices", 0.01, at_least=0)
    clip_grad: float = key("largest global gradient norm; 0 = no clipping", 1.0, at_least=0)
    vision_lr_scale: float = key("learning rate of the vision part, times this", 1.0, at_least=0)
    projector_lr_scale: float = key("learning rate of the projector, times this", 1.0, at_least=0)


@dataclass(frozen=True)
class LrPhase:
    """One stretch of the learning-rate schedule."""

    tokens: int = key("length of the phase in tokens", at_least=1)
    lr_start: float = key("learning rate at its start", at_least=0)
    lr_end: float = key("learning rate at its end", at_least=0)
    style: str = key("shape between the two", "cosine", choices=("cosine", "linear", "constant"))


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the tokens consumed."""

    warmup_tokens: int = key("linear warm-up from 0, at the beginning of the first phase", 0, at_least=0)
    phases: list[LrPhase] = key("phases, one after the other", factory=list)

    @property
    def total_tokens(self) -> int:
        """Tokens of all phases together."""
        return sum(phase.tokens for phase in self.phases)


@dataclass(frozen=True)
class TrainConfig:
    """Batch, length of the run, evaluation, logging."""

    micro_batch_size: int = key("rows of one forward pass on one data-parallel rank", 1, at_least=1)
    global_batch_size: int = key("rows of one optimizer step over all ranks", 8, at_least=1)
    train_steps: int | None = key("length of the run in steps; none = see train_tokens", None, at_least=1)
    train_tokens: int | None = key(
        "length of the run in tokens; none = train_steps, or the whole schedule", None, at_least=1
    )
    eval_interval: int = key("steps between evaluations; 0 = never", 0, at_least=0)
    eval_samples: int = key("held-out samples of one evaluation; 0 = all", 0, at_least=0)
    seed: int = key("seed of initialisation and dropout", 1234, at_least=0)
    init_from_hf: str | None = key("folder in the released layout to take the first weights from", None)
    init_from: str | None = key("checkpoint, or folder of a run, to take the first weights from", None)
    log_interval: int = key("steps between console lines", 1, at_least=1)
    loss_chunk_tokens: int | None = key(
        "tokens whose logits the loss holds at once; none = as many as fit 256 MiB in fp32", None, at_least=1
    )
    exit_duration_minutes: float | None = key(
        "minutes after its start at which a process saves, ends with code 75 and can be started again; none = no "
        "limit",
        None,
        above=0,
    )
    max_skipped_steps: int = key(
        "steps in a row whose loss or gradient may be infinite or not a number; they are skipped",
        10,
        at_least=0,
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving. Resuming from the newest checkpoint of the run folder is automatic."""

    save_interval: int = key("steps between checkpoints; 0 = none on the way", 0, at_least=0)
    save_at_end: bool = key("save after the last step", True)
    async_save: bool = key("write in the background; training waits for the copy off the device only", True)
    keep_last: int | None = key("newest checkpoints that are kept; none = all", None, at_least=1)
    keep_every: int = key("checkpoints of every so many steps are kept for good; 0 = none", 0, at_least=0)
    verify: str = key(
        "what is compared before resuming: size and sha256 of every file, or sizes only",
        "digest",
        choices=("digest", "size"),
    )
    strict: bool = key(
        "refuse to resume when a newer checkpoint is damaged or half-written, instead of using the newest good one",
        False,
    )
    timeout_seconds: int = key("how long writing one checkpoint may take", 1800, at_least=1)


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling from the training model, and image features that are computed once."""

    kv_cache_gib: float = key(
        "GiB per rank for keys and values of the rows that are generated at once", 4.0, above=0
    )
    max_rows: int = key("rows that are generated at once, at most", 256, at_least=1)
    allow_large_model: bool = key("let rollouts sample from models above 1B parameters", False)
    feature_dir: str | None = key("folder of computed image features; none = RUN_DIR/features", None)


@dataclass(frozen=True)
class RunConfig:
    """One run."""

    model: ModelConfig = key("the model", factory=ModelConfig)
    parallel: ParallelConfig = key("layout over ranks", factory=ParallelConfig)
    precision: PrecisionConfig = key("number formats", factory=PrecisionConfig)
    recompute: RecomputeConfig = key("activation recomputation", factory=RecomputeConfig)
    data: DataConfig = key("samples", factory=DataConfig)
    optim: OptimConfig = key("optimizer", factory=OptimConfig)
    schedule: ScheduleConfig = key("learning rate", factory=ScheduleConfig)
    train: TrainConfig = key("batch and length", factory=TrainConfig)
    checkpoint: CheckpointConfig = key("saving", factory=CheckpointConfig)
    generate: GenerateConfig = key("sampling", factory=GenerateConfig)
    rl: RlConfig = key("reinforcement learning; not read by pre-training", factory=RlConfig)
    run_dir: str = key("folder of the run: resolved config, log, metrics, checkpoints", "runs/default")
