"""What the forward pass of one micro-batch keeps for its backward pass on one rank: bytes by part.

Counted are the tensors that autograd saves, each storage once, without weights: what `saved_tensors_hooks` sees still
alive when the forward pass ends (tests/plan/test_kept.py). Sizes of single tensors are those of Megatron-Core 0.16.1
and of this package's own modules; the two backends differ in `Kernels`.

Not modelled: how unevenly visual tokens lie on context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_vl.config.model import ModelConfig, TextConfig, VisionConfig, halved
from megatron_vl.config.schema import RecomputeConfig, RunConfig
from megatron_vl.plan.cost import IMAGE_CHANNELS, view_costs
from megatron_vl.plan.kernels import FP32, WIDEST_NORM, Kernels
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.stages import Stage
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_counts

ID_BYTES = 8
SLOT_BYTES = 16  # of a visual token, where it is put: row and position
SMALLEST_MOVED = 1 << 20  # bytes: off-loading leaves smaller tensors where they are
SCORE_BYTES = 28  # of a scored token: place, label, and three fp32 statistics


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
    smallest: int = SMALLEST_MOVED,
) -> dict[str, int]:
    """Bytes of one chunk on the rank at `coords`: `vision`, `decoder` and `loss`.

    smallest: bytes of the smallest tensor that `recompute.offload` moves; what it moves is not counted, as if copies
    kept pace with computation.
    """
    text = model.text
    local = load.rows * load.tokens // layout.cp
    normed = local // layout.tp if layout.sp else local
    vision = vision_kept(model, layout, stage, kernels, load, recompute, layout.vision_rank(coords))
    hidden, smallest = hidden_bytes(text, layout, kernels, load), smallest_moved(recompute, smallest)
    away = hidden >= smallest
    decoder = ID_BYTES * local * stage.has_embedding
    if stage.layers and recompute.decoder == "full":
        groups = -(-len(stage.layers) // recompute.decoder_num_layers)
        decoder += hidden * (groups * (not away))
        # rotary angles: of the longest document of a packed row, whole on every context-parallel rank
        decoder += max(load.documents, default=load.tokens // layout.cp) * text.kv_channels * FP32
    else:
        selective, trained = recompute.decoder == "selective", not model.freeze_decoder
        small = len(kernels.fp8.intersection(stage.layers))
        for count, quantised in ((len(stage.layers) - small, False), (small, True)):
            if count:
                of_layer = (text, layout, kernels, load, selective, trained, quantised)
                left = layer_moved(*of_layer, smallest)[0] if recompute.offload else layer_kept(*of_layer)
                decoder += count * left
    if stage.layers and away and not stage.has_embedding:
        decoder += hidden  # the stage's input, which is no part of its graph
    loss = 0
    if stage.has_head:
        norm = norm_saved(text.hidden_size, normed, kernels, not model.freeze_decoder)
        loss = sum(one.left(smallest) for one in norm) + hidden + SCORE_BYTES * local
    return {"vision": vision, "decoder": decoder, "loss": loss}


def hidden_bytes(text: TextConfig, layout: Layout, kernels: Kernels, load: Load) -> int:
    """Bytes of the hidden states between two layers."""
    tokens = load.rows * load.tokens // layout.cp // (layout.tp if layout.sp else 1)
    return tokens * text.hidden_size * kernels.element


def smallest_moved(recompute: RecomputeConfig, smallest: int) -> int:
    """Bytes from which a tensor leaves the device; none does without off-loading."""
    return smallest if recompute.offload else 1 << 62


@dataclass(frozen=True)
class Saved:
    """A storage that a decoder layer keeps.

    views: bytes of each tensor in it that autograd saves, as often as it saves it; empty where off-loading leaves it
    alone (`model/offload.py`): what is no part of the graph, like tensors that a function has made for itself.
    """

    size: int
    views: tuple[int, ...] = ()

    def moved(self, smallest: int) -> int:
        """Bytes that travel to the host, and back."""
        return sum(view for view in self.views if view >= smallest)

    def left(self, smallest: int) -> int:
        """Bytes that stay: all of it where one tensor does."""
        return 0 if self.views and min(self.views) >= smallest else self.size


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
    return sum(one.size for one in layer_saved(text, layout, kernels, load, selective, trained, quantised))


@lru_cache(maxsize=1 << 16)
def layer_moved(
    text: TextConfig,
    layout: Layout,
    kernels: Kernels,
    load: Load,
    selective: bool,
    trained: bool = True,
    quantised: bool = False,
    smallest: int = SMALLEST_MOVED,
) -> tuple[int, int]:
    """(bytes of such a layer that stay on the device with off-loading, bytes that are moved, one way)."""
    found = layer_saved(text, layout, kernels, load, selective, trained, quantised)
    return sum(one.left(smallest) for one in found), sum(one.moved(smallest) for one in found)


def layer_saved(
    text: TextConfig,
    layout: Layout,
    kernels: Kernels,
    load: Load,
    selective: bool,
    trained: bool,
    quantised: bool,
) -> list[Saved]:
    """What one decoder layer keeps."""
    tp, element, head = layout.tp, kernels.element, text.kv_channels
    local = load.rows * load.tokens // layout.cp
    normed = local // tp if layout.sp else local
    heads, groups = text.num_attention_heads // tp, max(text.num_query_groups // tp, 1)
    found = 2 * norm_saved(text.hidden_size, normed, kernels, trained)
    operand = 1 if quantised else element

    def input_of_product(values: int) -> Saved:
        # in FP8 a copy that the product has made for itself; Transformer Engine norms inside the product
        own = quantised or not kernels.joined_rows
        return Saved(operand * values, () if own else (operand * values,))

    if trained:
        inner = local * text.ffn_hidden_size // tp
        found += 2 * [input_of_product(normed * text.hidden_size)]
        found.append(Saved(operand * inner, () if quantised else (operand * inner,)))
        if quantised:
            found.append(Saved(local * heads * head))  # the attention's output again
    queries, keys = local * heads * head, local * groups * head
    copied = heads > groups > 1  # reshaping the queries of several groups copies them
    views, upcast = head_norms_saved(queries, keys, head, copied, kernels, trained)
    found += upcast
    attention, v_is_local = attention_saved(
        queries, keys, local * heads, kernels, load, selective, trained and not quantised
    )
    found += attention
    if v_is_local:
        views += (element * keys,)
    if views:  # the product of the q, k, v weights; else nothing refers to it any more
        mixed = (heads + 2 * groups) * head * element
        if (
            text.num_query_groups < tp
        ):  # ranks that share a key head gather the whole product and take a view of it
            mixed = (text.num_attention_heads + 2 * text.num_query_groups) * head * element
        found.append(Saved(local * mixed, views))
    found.append(Saved(4 * load.tokens // layout.cp * head * element))  # cosines and sines, for q and for k
    one = local * text.ffn_hidden_size // tp * element
    return [
        *found,
        Saved(2 * one, (one,)),
        Saved(one, (one,)),
        Saved(one, (one,)),
    ]  # gate and up, up again, SiLU


def norm_saved(width: int, tokens: int, kernels: Kernels, trained: bool) -> list[Saved]:
    """One RMS norm: its input, 1 / rms, and where it is trained but not fused the normalised input."""
    statistics = Saved(tokens * FP32, (tokens * FP32,))
    if kernels.fused_norm:
        return [Saved(tokens * width * kernels.element, (tokens * width * kernels.element,)), statistics]
    whole = tokens * width * FP32
    return [Saved(whole, (whole, whole)), statistics] + [Saved(whole, (whole,))] * trained


def head_norms_saved(
    queries: int, keys: int, head: int, copied: bool, kernels: Kernels, trained: bool
) -> tuple[tuple[int, ...], list[Saved]]:
    """The norms of queries and keys: (their views of the q, k, v product, what else they keep).

    queries, keys: how many values they have.
    """
    rows, element = (queries + keys) // head, kernels.element
    found = [Saved(FP32 * rows, (FP32 * queries // head, FP32 * keys // head))]
    if kernels.fused_norm or element == FP32:  # the product itself, or a copy of the queries
        times = 1 if kernels.fused_norm else 2
        own = (queries * element,) * times
        if copied:
            found.append(Saved(queries * element, own))
        views = (() if copied else own) + (keys * element,) * times
    else:
        views = ()
        found += [Saved(FP32 * size, (FP32 * size,) * 2) for size in (queries, keys)]
    if trained and not kernels.fused_norm:
        found += [Saved(FP32 * size, (FP32 * size,)) for size in (queries, keys)]
    return views, found


def attention_saved(
    queries: int, keys: int, sums: int, kernels: Kernels, load: Load, selective: bool, projected: bool
) -> tuple[list[Saved], bool]:
    """(the attention of one layer without V, whether V is kept as part of the q, k, v product). projected: the product
    behind it keeps its output too."""
    q, k = queries * kernels.element, keys * kernels.element
    again = kernels.joined_rows and load.rows > 1 and not selective
    output = Saved(q, (q,) * (1 + (projected and not again) - selective))
    found = [Saved(q, (q,)), Saved(k, (k,)), output]
    if selective:
        return found, True
    found.append(Saved(sums * FP32))  # log-sum-exp
    if again:
        return [*found, Saved(k, (k,)), Saved(q, (q,))], False
    return found, True


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
        if again:  # the pixels alone
            side = (vision.crop_size, vision.image_size)[kind]
            total += count * IMAGE_CHANNELS * side * side * kernels.pixel
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
    shared = element == FP32 or kernels.takes(vision.head_dim)  # else each block keeps a rounded one
    table = per_view * vision.head_dim * FP32 if shared else 0
    return stem + down + table + vision.num_layers * block_kept(vision, per_view, count, split, kernels)


def block_kept(vision: VisionConfig, per_view: int, count: int, split: int, kernels: Kernels) -> int:
    """Bytes of one block of the tower for `count` views of `per_view` patches."""
    width, inner, patches, element = (
        vision.hidden_size,
        vision.ffn_hidden_size // split,
        count * per_view,
        kernels.element,
    )
    operand = 1 if kernels.fp8_vision else element  # of a product
    normed = kernels.takes(width, WIDEST_NORM) and kernels.joined_rows
    # inputs and outputs of both norms, what the layer scales multiply; statistics, those of a fused norm in fp32
    whole = 4 * width * element + 2 * width * operand + 2 * element + 2 * (FP32 if normed else element)
    rotated, joined = kernels.takes(vision.head_dim), kernels.joined_rows and count > 1
    # q, k, output; v, or the product that it is a view of; the output as the next product takes it
    attention = (3 + (1 if rotated or joined else 3)) * width * element
    attention += width * (operand if joined else kernels.fp8_vision)
    # x and its sigmoid, or x alone; their product
    activation = inner * ((1 if kernels.takes(inner) else 2) * element + operand)
    logsumexp = FP32 * vision.num_attention_heads // split
    # cosines and sines, rounded; one fp32 table serves all blocks else
    rotary = 0 if rotated or element == FP32 else per_view * vision.head_dim * element
    return patches * (whole + attention // split + activation + logsumexp) + rotary
