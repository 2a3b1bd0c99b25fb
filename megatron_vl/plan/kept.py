"""What the forward pass of one micro-batch keeps for its backward pass on one rank: bytes by part.

Counted are the tensors that autograd saves, each storage once, without weights: what `saved_tensors_hooks` sees still
alive when the forward pass ends (tests/plan/test_kept.py). Sizes of single tensors are those of Megatron-Core 0.16.1
and of this package's own modules; the two backends differ in `Kernels`.

Not modelled: `recompute.offload` (what layers keep counts as if it stayed), pixels as bytes (`data.image_mode: fast`;
chunks of views keep four times less than planned), and how unevenly visual tokens lie on context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_vl.config.model import ModelConfig, TextConfig, VisionConfig, halved
from megatron_vl.config.schema import RecomputeConfig, RunConfig
from megatron_vl.plan.cost import IMAGE_CHANNELS, view_costs
from megatron_vl.plan.fp8 import Fp8Layers
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.stages import Stage
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_counts

FP32 = 4
ID_BYTES = 8
SLOT_BYTES = 16  # of a visual token, where it is put: row and position
SCORE_BYTES = 28  # of a scored token: place, label, and three fp32 statistics


@dataclass(frozen=True)
class Kernels:
    """Where backends keep different things.

    element: bytes of an activation. fused_norm: an RMS norm keeps its input; else (torch on a CPU) the input and the
    normalised input, both in fp32. joined_rows: attention takes several dense rows, or views, as one (torch), which
    copies V and the output. ring: context-parallel ranks pass K and V on; else they gather all of them for a moment.
    fp8: decoder layers with products in FP8, which keep their inputs so; the tower counts as if it had none.
    """

    element: int
    fused_norm: bool
    joined_rows: bool
    ring: bool
    fp8: frozenset[int] = frozenset()


def kernels_of(
    backend: str, element: int, on_cpu: bool, exchange: str = "p2p", fp8: Fp8Layers | None = None
) -> Kernels:
    """backend, exchange: `parallel.layer_backend`, where `auto` is taken as Transformer Engine on GPUs, and
    `parallel.cp_comm_type`, where `a2a` counts as a ring. element: 2 (bf16) or 4 (fp32)."""
    fused = backend == "transformer_engine" or (backend == "auto" and not on_cpu)
    layers = frozenset() if fp8 is None else fp8.decoder
    return Kernels(element, fused or not on_cpu, not fused, exchange != "all_gather", layers)


@dataclass(frozen=True)
class Load:
    """One micro-batch: rows of `tokens` tokens, and how many crops and global views they have together.

    documents: padded lengths of the documents of the row when it is packed (rows = 1), else empty.
    """

    rows: int
    tokens: int
    crops: int = 0
    globals: int = 0
    documents: tuple[int, ...] = ()


def fullest_load(config: RunConfig) -> Load:
    """The micro-batch of a run with most views: as many as its tokens and the limits of packing allow, crops first."""
    vision, packing, tokens = config.model.vision, config.data.packing, config.data.seq_length
    most_globals, most_crops = (
        (packing.max_global_views, packing.max_crops) if packing.enabled else (None, None)
    )
    crops = min(tokens // vision.crop_tokens, tokens if most_crops is None else most_crops)
    left = tokens - crops * vision.crop_tokens
    globals_ = min(left // vision.global_tokens, left if most_globals is None else most_globals)
    rows = config.train.micro_batch_size
    documents = (tokens,) if packing.enabled else ()
    return Load(rows, tokens, rows * crops, rows * globals_, documents)


def kept_by_chunk(
    model: ModelConfig,
    layout: Layout,
    stage: Stage,
    kernels: Kernels,
    load: Load,
    recompute: RecomputeConfig,
    coords: Coords,
) -> dict[str, int]:
    """Bytes of one chunk on the rank at `coords`: `vision`, `decoder` and `loss`."""
    text = model.text
    local = load.rows * load.tokens // layout.cp
    normed = local // layout.tp if layout.sp else local
    vision = vision_kept(model, layout, stage, kernels, load, recompute, layout.vision_rank(coords))
    decoder = ID_BYTES * local * stage.has_embedding
    if stage.layers and recompute.decoder == "full":
        groups = -(-len(stage.layers) // recompute.decoder_num_layers)
        decoder += groups * normed * text.hidden_size * kernels.element
        # rotary angles: of the longest document of a packed row, whole on every context-parallel rank
        decoder += max(load.documents, default=load.tokens // layout.cp) * text.kv_channels * FP32
    else:
        selective, trained = recompute.decoder == "selective", not model.freeze_decoder
        small = len(kernels.fp8.intersection(stage.layers))
        for count, quantised in ((len(stage.layers) - small, False), (small, True)):
            if count:
                decoder += count * layer_kept(text, layout, kernels, load, selective, trained, quantised)
    loss = 0
    if stage.has_head:
        loss = (
            norm_kept(text.hidden_size, normed, kernels, not model.freeze_decoder)
            + normed * text.hidden_size * kernels.element
        )
        loss += SCORE_BYTES * local
    return {"vision": vision, "decoder": decoder, "loss": loss}


@lru_cache(maxsize=1 << 16)
def layer_kept(
    text: TextConfig,
    layout: Layout,
    kernels: Kernels,
    load: Load,
    selective: bool,
    trained: bool = True,
    quantised: bool = False,
) -> int:
    """Bytes of one decoder layer that is not recomputed as a whole. trained: its weights need a gradient. quantised:
    its products are in FP8."""
    tp, element, head = layout.tp, kernels.element, text.kv_channels
    local = load.rows * load.tokens // layout.cp
    normed = local // tp if layout.sp else local
    heads, groups = text.num_attention_heads // tp, max(text.num_query_groups // tp, 1)
    norms = 2 * norm_kept(text.hidden_size, normed, kernels, trained)
    linears = trained * linear_inputs(text, layout, kernels, load, quantised)
    mixed = (heads + 2 * groups) * head * element  # the product of the q, k, v weights
    if (
        text.num_query_groups < tp
    ):  # ranks that share a key head gather the whole product and take a view of it
        mixed = (text.num_attention_heads + 2 * text.num_query_groups) * head * element
    copied = heads > groups > 1  # reshaping the queries of several groups copies them
    if kernels.fused_norm:
        head_norms = copied * heads * head * element + FP32 * (heads + groups)
    else:
        upcast = (copied * heads * head if element == FP32 else (heads + groups) * head) * FP32
        head_norms = upcast + FP32 * (heads + groups) * (head * trained + 1)
    attention, v_is_local = attention_kept(text, layout, kernels, load, selective)
    if not v_is_local and not kernels.fused_norm and element != FP32:
        mixed = 0  # nothing refers to it any more
    rotary = 4 * load.tokens // layout.cp * head * element  # cosines and sines, for q and for k
    gated = 4 * text.ffn_hidden_size // tp * element  # gate and up, up again, SiLU of the gate
    return norms + linears + local * (mixed + head_norms + gated) + rotary + attention


def linear_inputs(
    text: TextConfig, layout: Layout, kernels: Kernels, load: Load, quantised: bool = False
) -> int:
    """Bytes of the inputs of a layer's products; that of the attention's output is kept by attention, in FP8 again."""
    local = load.rows * load.tokens // layout.cp
    normed = local // layout.tp if layout.sp else local
    values = 2 * normed * text.hidden_size + local * text.ffn_hidden_size // layout.tp
    if quantised:
        return values + local * text.num_attention_heads * text.kv_channels // layout.tp
    return kernels.element * values


def norm_kept(width: int, tokens: int, kernels: Kernels, trained: bool) -> int:
    """Bytes of one RMS norm: its input, 1 / rms, and where it is trained but not fused the normalised input."""
    unfused = width * FP32 * (1 + trained)
    return tokens * ((width * kernels.element if kernels.fused_norm else unfused) + FP32)


def attention_kept(
    text: TextConfig, layout: Layout, kernels: Kernels, load: Load, selective: bool
) -> tuple[int, bool]:
    """(bytes of the attention of one layer without V, whether V is kept as part of the q, k, v product)."""
    tp, element = layout.tp, kernels.element
    local = load.rows * load.tokens // layout.cp
    heads, groups = text.num_attention_heads // tp, max(text.num_query_groups // tp, 1)
    queries, keys = heads * text.kv_channels * element, groups * text.kv_channels * element
    own = local * (2 * queries + keys)  # q, output, k
    if selective:
        return own, True
    own += local * heads * FP32  # log-sum-exp
    if kernels.joined_rows and load.rows > 1:
        return own + local * (keys + queries), False
    return own, True


def vision_kept(
    model: ModelConfig,
    layout: Layout,
    stage: Stage,
    kernels: Kernels,
    load: Load,
    recompute: RecomputeConfig,
    share: int,
) -> int:
    """Bytes of tower, projector and fusion, for the `share`-th share of the views."""
    vision = model.vision
    tokens = (vision.crop_tokens, vision.global_tokens)
    slots = load.crops * tokens[CROP] + load.globals * tokens[GLOBAL]
    slot_bytes = slots * SLOT_BYTES // (layout.cp * (layout.tp if layout.sp else 1))
    if layout.tower_beside:
        return slot_bytes * stage.has_embedding
    if not stage.has_vision or not load.crops + load.globals:
        return 0
    mine = view_shares(load.crops, load.globals, layout.vision_size, view_costs(model))[share]
    total = 0
    again = recompute.vision_chunk_views is not None and not model.freeze_vision
    split = layout.tp if layout.placement == "tensor" else 1
    for kind, count in zip((CROP, GLOBAL), mine):
        if again:  # the pixels alone, in fp32
            side = (vision.crop_size, vision.image_size)[kind]
            total += count * IMAGE_CHANNELS * side * side * FP32
            continue
        if count and not model.freeze_vision:
            full = recompute.vision_num_layers if recompute.vision == "full" else 0
            total += tower_kept(vision, kind, count, split, kernels, full)
        if not model.freeze_projector:
            total += count * tokens[kind] * vision.output_size * kernels.element
    return total + slot_bytes


def step_views_kept(
    model: ModelConfig,
    layout: Layout,
    kernels: Kernels,
    load: Load,
    recompute: RecomputeConfig,
    num_microbatches: int,
    coords: Coords,
) -> int:
    """Placement `all`: bytes that a rank keeps of the views of a whole step while the pipeline runs (train/views.py).

    What the waves keep for their backward pass and their features, nothing where they are computed again; on the first
    stage the features of the rank's positions, and their gradients. Pixels wait in host memory.
    """
    vision, width, total = model.vision, model.text.hidden_size, 0
    tokens = (vision.crop_tokens, vision.global_tokens)
    trained = not (model.freeze_vision and model.freeze_projector)
    again = recompute.vision_chunk_views is not None and not model.freeze_vision
    full = recompute.vision_num_layers if recompute.vision == "full" else 0
    views = (load.crops * num_microbatches, load.globals * num_microbatches)
    mine = view_shares(*views, layout.vision_size, view_costs(model))[layout.vision_rank(coords)]
    for kind, count in zip((CROP, GLOBAL), mine):
        if again or not trained:
            continue
        if not model.freeze_vision:
            size = wave_size(count, recompute.vision_chunk_views, num_microbatches)
            whole, rest = divmod(count, size)
            total += whole * tower_kept(vision, kind, size, 1, kernels, full)
            total += tower_kept(vision, kind, rest, 1, kernels, full) if rest else 0
        if not model.freeze_projector:
            total += count * tokens[kind] * vision.output_size * kernels.element
        total += count * tokens[kind] * width * kernels.element
    if coords.pp == 0:
        rows = num_microbatches * (load.crops * tokens[CROP] + load.globals * tokens[GLOBAL])
        rows //= layout.cp * (layout.tp if layout.sp else 1)
        total += rows * width * kernels.element * (1 + trained)
    return total


def wave_size(count: int, chunk: int | None, num_microbatches: int) -> int:
    """How many of a rank's views of one size are encoded together: `recompute.vision_chunk_views`, or as many as there
    are per micro-batch."""
    return chunk or max(1, -(-count // num_microbatches))


@lru_cache(maxsize=4096)
def view_shares(crops: int, globals_: int, size: int, costs: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(crops, global views) of each share, remembered."""
    return tuple(share_counts(crops, globals_, size, costs))


@lru_cache(maxsize=4096)
def heaviest_share(model: ModelConfig, crops: int, globals_: int, size: int) -> int:
    """Which share of the views has the most patches."""
    patches = (model.vision.crop_grid**2, model.vision.global_grid**2)
    shares = view_shares(crops, globals_, size, view_costs(model))
    loads = [c * patches[CROP] + g * patches[GLOBAL] for c, g in shares]
    return loads.index(max(loads))


def heaviest(model: ModelConfig, load: Load, size: int) -> tuple[int, int]:
    """(crops, global views) of the share with the most patches."""
    share = heaviest_share(model, load.crops, load.globals, size)
    return view_shares(load.crops, load.globals, size, view_costs(model))[share]


@lru_cache(maxsize=4096)
def tower_kept(vision: VisionConfig, kind: int, count: int, split: int, kernels: Kernels, group: int) -> int:
    """Bytes of `count` views of one kind. group: blocks per recomputed group, 0 = nothing is recomputed."""
    element, grid = kernels.element, vision.crop_grid if kind == CROP else vision.global_grid
    per_view, width = grid * grid, vision.hidden_size
    patches = count * per_view
    stem = patches * element * (IMAGE_CHANNELS * vision.patch_size**2 + width + 2)
    half = halved(grid)
    down = element * (
        patches * width + count * half**2 * 2 * width // split
    )  # tokens; windows are gathered again
    if group:
        groups = -(-vision.num_layers // group)
        return stem + down + groups * patches * width * element + per_view * vision.head_dim * FP32
    table = per_view * vision.head_dim * FP32 if element == FP32 else 0  # else each block keeps a rounded one
    return stem + down + table + vision.num_layers * block_kept(vision, per_view, count, split, kernels)


def block_kept(vision: VisionConfig, per_view: int, count: int, split: int, kernels: Kernels) -> int:
    """Bytes of one block of the tower for `count` views of `per_view` patches."""
    width, patches, element = vision.hidden_size, count * per_view, kernels.element
    whole = 6 * width + 4  # both norms' inputs and statistics and outputs, what the layer scales multiply
    joined = kernels.joined_rows and count > 1
    attention = 5 if joined else 6  # q, k, output; the product that v is a view of, or copies of v and output
    cut = attention * width + 3 * vision.ffn_hidden_size  # x, its sigmoid, their product
    logsumexp = FP32 * vision.num_attention_heads // split
    rotary = per_view * vision.head_dim * element if element != FP32 else 0  # cosines and sines
    return patches * (whole * element + cut * element // split + logsumexp) + rotary
