"""The one cost model: parameters by part and FLOPs by part, from the description alone.

A matrix product of m x k with k x n counts 2 * m * n * k; norms, activations, softmax and the optimizer count
nothing. Causal attention counts half of its square, since a token attends to half of the row on average; full
attention in the tower counts all of it. Which of it a rank does is in `plan/step_time.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from megatron_vl.config.model import ModelConfig, TextConfig
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.plan.vision_share import CROP, GLOBAL

IMAGE_CHANNELS = 3
CONV_TAPS = 9  # both downsamplers have kernel 3 x 3

# The parts of the FLOP count, in the order of the forward pass.
TOWER_PARTS = ("patch_embed", "vision_linear", "vision_attention", "downsamplers", "projector")
DECODER_PARTS = ("decoder_linear", "decoder_attention", "lm_head")
PARTS = TOWER_PARTS + DECODER_PARTS

# Dense peaks in FLOP/s by words of the CUDA name, from NVIDIA's data sheets, where most are given with sparsity, twice
# as much: A100 (PCIe and SXM alike), H100 (SXM, PCIe, NVL), H200 (SXM, NVL), GH200, HGX B200. Without words behind it
# a name is the SXM module.
PEAK_FLOPS: dict[str, dict[str, float]] = {
    "A100": {"bf16": 312e12},
    "H100": {"bf16": 989e12, "fp8": 1979e12},
    "H100 PCIe": {"bf16": 756e12, "fp8": 1513e12},
    "H100 NVL": {"bf16": 835e12, "fp8": 1671e12},
    "H200": {"bf16": 989e12, "fp8": 1979e12},
    "H200 NVL": {"bf16": 835e12, "fp8": 1671e12},
    "GH200": {"bf16": 989e12, "fp8": 1979e12},
    "B200": {"bf16": 2250e12, "fp8": 4500e12},
}


def listed_name(device_name: str) -> str | None:
    """The name in `PEAK_FLOPS` of a device by its CUDA name, e.g. `NVIDIA A100-SXM4-80GB`, or None.

    The longest whose words are all there. A slice of a GPU (MIG) is none.
    """
    words = set(device_name.replace("-", " ").split())
    found = [name for name in PEAK_FLOPS if words.issuperset(name.split())]
    return None if "MIG" in words else max(found, key=len, default=None)


def peak_flops(device_name: str, precision: str = "bf16") -> float | None:
    """Dense peak in FLOP/s of a device by its CUDA name, or None."""
    name = listed_name(device_name)
    return None if name is None else PEAK_FLOPS[name].get(precision)


def parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part of the released checkpoint, then the subtotals.

    For the released 10B model `total` is 10,171,750,144.
    """
    vision, text = model.vision, model.text
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    attention = 4 * width * width + 4 * width
    mlp = 2 * width * inner + inner + width
    norms_and_scales = 6 * width  # two layer norms with bias, two layer scales
    parts = {
        "conv1": IMAGE_CHANNELS * vision.patch_size**2 * width,
        "positional_embedding": vision.global_grid**2 * width,
        "ln_pre": 2 * width,
        "vision_blocks": vision.num_layers * (attention + mlp + norms_and_scales),
        "vit_downsampler1": CONV_TAPS * width * 2 * width + 2 * width,
        "vit_downsampler2": CONV_TAPS * 2 * width * 4 * width + 4 * width,
        "projector": vision.output_size * text.hidden_size,
        "token_embedding": text.vocab_size * text.hidden_size,
        "decoder_layers": text.num_layers
        * (decoder_layer_matrices(text) + 2 * text.hidden_size + 2 * text.kv_channels),
        "final_norm": text.hidden_size,
        "lm_head": text.vocab_size * text.hidden_size,
    }
    tower = sum(parts[name] for name in ("conv1", "positional_embedding", "ln_pre", "vision_blocks"))
    full_tower = tower + parts["vit_downsampler1"] + parts["vit_downsampler2"]
    decoder = sum(parts[name] for name in ("token_embedding", "decoder_layers", "final_norm", "lm_head"))
    return parts | {
        "vision_without_downsamplers": tower,
        "vision": full_tower,
        "decoder": decoder,
        "total": full_tower + parts["projector"] + decoder,
    }


def decoder_layer_matrices(text: TextConfig) -> int:
    """Elements of the weight matrices of one decoder layer: q, k, v, output, gate, up, down."""
    queries, keys = text.num_attention_heads * text.kv_channels, text.num_query_groups * text.kv_channels
    return text.hidden_size * (2 * queries + 2 * keys + 3 * text.ffn_hidden_size)


def view_flops(model: ModelConfig, kind: int) -> dict[str, int]:
    """Forward FLOPs of one view (CROP or GLOBAL) by tower part, downsamplers and projector included."""
    vision = model.vision
    width, layers = vision.hidden_size, vision.num_layers
    grid = {CROP: vision.crop_grid, GLOBAL: vision.global_grid}[kind]
    tokens = {CROP: vision.crop_tokens, GLOBAL: vision.global_tokens}[kind]
    patches, half_grid = grid**2, (grid + 1) // 2
    return {
        "patch_embed": 2 * patches * IMAGE_CHANNELS * vision.patch_size**2 * width,
        "vision_linear": layers * 2 * patches * (4 * width * width + 2 * width * vision.ffn_hidden_size),
        "vision_attention": layers * 4 * patches**2 * width,
        "downsamplers": 2 * CONV_TAPS * (half_grid**2 * width * 2 * width + tokens * 2 * width * 4 * width),
        "projector": 2 * tokens * vision.output_size * model.text.hidden_size,
    }


@lru_cache(maxsize=64)
def view_costs(model: ModelConfig) -> tuple[int, int]:
    """Forward FLOPs of one crop and of one global view: what `share_views` balances.

    Whatever is frozen or computed again, so that it is a function of the model's shape alone.
    """
    crop, whole = (sum(view_flops(model, kind).values()) for kind in (CROP, GLOBAL))
    return crop, whole


def decoder_layer_flops(
    model: ModelConfig, doc_lengths: Sequence[int], tokens: int | None = None
) -> tuple[int, int]:
    """Forward FLOPs of ONE decoder layer: (linear, causal attention).

    doc_lengths: documents that attend only to themselves. tokens: rows of the matrix products, by default the
    sum of the lengths; give the row length to count padding too.
    """
    text = model.text
    rows = sum(doc_lengths) if tokens is None else tokens
    queries = text.num_attention_heads * text.kv_channels
    return 2 * rows * decoder_layer_matrices(text), 2 * queries * sum(length**2 for length in doc_lengths)


def sample_flops(
    model: ModelConfig, view_kinds: Sequence[int], doc_lengths: Sequence[int], tokens: int | None = None
) -> dict[str, int]:
    """Forward FLOPs by part (`PARTS`) of views and documents, as in `decoder_layer_flops`."""
    views = {kind: view_flops(model, kind) for kind in (CROP, GLOBAL)}
    counts = {kind: sum(1 for other in view_kinds if other == kind) for kind in (CROP, GLOBAL)}
    linear, attention = decoder_layer_flops(model, doc_lengths, tokens)
    rows = sum(doc_lengths) if tokens is None else tokens
    tower = {part: sum(counts[kind] * views[kind][part] for kind in views) for part in TOWER_PARTS}
    return tower | {
        "decoder_linear": model.text.num_layers * linear,
        "decoder_attention": model.text.num_layers * attention,
        "lm_head": 2 * rows * model.text.hidden_size * model.text.vocab_size,
    }


def train_multipliers(model: ModelConfig, recompute: RecomputeConfig | None = None) -> dict[str, int]:
    """How many forward passes' worth of FLOPs a training step spends on each part.

    A trained product costs 3: forward, gradient of its input, gradient of its weight. A frozen tower costs 1,
    since nothing below it needs a gradient. A frozen decoder costs 2 as long as gradients flow through it to
    the projector or the tower; its attention, which has no weights, still costs 3.
    recompute None: model FLOPs, which MFU counts. Otherwise the repeated forward passes are added (hardware
    FLOPs).
    """
    train_vision, train_projector = not model.freeze_vision, not model.freeze_projector
    below_decoder = train_vision or train_projector
    tower = 3 if train_vision else 1
    projector = 1 + train_vision + train_projector
    decoder_flow = below_decoder or not model.freeze_decoder
    decoder = 1 + decoder_flow + (not model.freeze_decoder)
    result = {
        "patch_embed": tower,
        "vision_linear": tower,
        "vision_attention": tower,
        "downsamplers": tower,
        "projector": projector,
        "decoder_linear": decoder,
        "decoder_attention": 3 if decoder_flow else 1,
        "lm_head": decoder,
    }
    if recompute is None:
        return result
    if recompute.vision == "full" and train_vision:
        for part in ("vision_linear", "vision_attention"):
            result[part] += 1
    if recompute.vision_chunk_views is not None and train_vision:
        for part in TOWER_PARTS:
            result[part] += 1
    if decoder_flow and recompute.decoder != "none":
        result["decoder_attention"] += 1
        result["decoder_linear"] += recompute.decoder == "full"
    return result


def train_flops(
    model: ModelConfig, forward: Mapping[str, float], recompute: RecomputeConfig | None = None
) -> dict[str, float]:
    """Training FLOPs by part from forward FLOPs by part (`sample_flops`, or a rank's share of them)."""
    multipliers = train_multipliers(model, recompute)
    return {part: flops * multipliers[part] for part, flops in forward.items()}


def tower_and_decoder(flops: Mapping[str, float]) -> tuple[float, float]:
    """Sums of the tower parts (projector included) and of the decoder parts."""
    return sum(flops[part] for part in TOWER_PARTS), sum(flops[part] for part in DECODER_PARTS)
