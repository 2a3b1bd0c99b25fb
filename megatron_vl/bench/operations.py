"""The operations that csrc/ has kernels for, and those that they are measured against, as one table.

An operation is one entry of `OPERATIONS`: a function that makes its inputs at a size and names the ways of computing
it, PyTorch's first. ``ours`` is the kernel itself, whatever the dispatch would choose; where there is none the row says
why.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from megatron_vl.bench.loss import Alone
from megatron_vl.bench.plain_model import tower_angles, turned_pairs
from megatron_vl.config.model import CLIP_MEAN, CLIP_STD, ModelConfig
from megatron_vl.errors import MegatronVLError
from megatron_vl.ops import library
from megatron_vl.ops.activation import quick_gelu
from megatron_vl.ops.context_attention import attention
from megatron_vl.ops.cross_entropy import HeadShard, Scoring, score_tokens
from megatron_vl.plan.cost import view_flops
from megatron_vl.plan.loss_chunk import loss_chunk_tokens
from megatron_vl.plan.vision_share import CROP, GLOBAL

Tensors = tuple[torch.Tensor, ...]
Way = Callable[..., torch.Tensor | Tensors]


@dataclass(frozen=True)
class Size:
    """views of one kind (CROP or GLOBAL), tokens of a packed row; where and in what format."""

    model: ModelConfig
    views: int
    kind: int
    tokens: int
    device: torch.device
    dtype: torch.dtype

    @property
    def grid(self) -> int:
        """Patches per side."""
        vision = self.model.vision
        return vision.global_grid if self.kind == GLOBAL else vision.crop_grid

    def random(self, *shape: int, grad: bool = True, scale: float = 1.0) -> torch.Tensor:
        """Normally distributed numbers on the device."""
        made = torch.randn(shape, device=self.device, dtype=torch.float32).mul_(scale).to(self.dtype)
        return made.requires_grad_(grad)


@dataclass(frozen=True)
class Work:
    """An operation at one size.

    inputs: of every way; those that require a gradient get one. flops, nbytes: of the forward pass, the least that it
    must do and move. backward: how many times that the backward pass takes, by either count. ways: by name, the first
    is what the others must equal. missing: name of a way and why it is not there.
    """

    shape: str
    inputs: Tensors
    flops: float
    nbytes: float
    backward: float
    ways: Mapping[str, Way]
    missing: Mapping[str, str] = field(default_factory=dict)


def kernel(
    size: Size, operator: str, call: Callable[[Callable], Way]
) -> tuple[dict[str, Way], dict[str, str]]:
    """({"ours": way}, {}) for an operator of csrc/, or ({}, {"ours": why it cannot be used on this device}).

    call: makes the way from the operator.
    """
    try:
        reason = library.why_not(size.device)
        if reason is None:
            return {"ours": call(getattr(torch.ops.megatron_vl, operator))}, {}
    except (AttributeError, MegatronVLError) as error:
        reason = str(error)
    return {}, {"ours": reason}


def projector(size: Size) -> Work:
    """Two 3x3 stride-2 convolutions and a linear layer, from tokens ``[s, b, h]`` to rows ``[s', b, H]``."""
    vision, hidden = size.model.vision, size.model.text.hidden_size
    width, s = vision.hidden_size, size.grid**2
    x = size.random(s, size.views, width)
    w1, b1 = size.random(2 * width, width, 3, 3, scale=(9 * width) ** -0.5), size.random(2 * width)
    w2, b2 = size.random(4 * width, 2 * width, 3, 3, scale=(18 * width) ** -0.5), size.random(4 * width)
    w3 = size.random(hidden, 4 * width, scale=(4 * width) ** -0.5)

    def convolutions(layout: torch.memory_format) -> Way:
        def run(x, w1, b1, w2, b2, w3):
            grid = size.grid
            image = x.view(grid, grid, size.views, width).permute(2, 3, 0, 1).contiguous(memory_format=layout)
            w1, w2 = w1.contiguous(memory_format=layout), w2.contiguous(memory_format=layout)
            image = F.conv2d(F.conv2d(image, w1, b1, 2, 1), w2, b2, 2, 1)
            return F.linear(image.flatten(2).permute(2, 0, 1), w3)

        return run

    def gathered(x, w1, b1, w2, b2, w3):
        for weight, bias in ((w1, b1), (w2, b2)):
            grid = math.isqrt(x.shape[0])
            image = x.permute(1, 2, 0).unflatten(2, (grid, grid))
            x = F.linear(F.unfold(image, 3, padding=1, stride=2).permute(2, 0, 1), weight.flatten(1), bias)
        return F.linear(x, w3)

    found, missing = projector_kernel(size)

    flops = view_flops(size.model, size.kind)
    tokens = (vision.crop_tokens, vision.global_tokens)[size.kind]
    moved = _bytes(x, w1, w2, w3) + size.views * tokens * hidden * x.element_size()
    ways = {
        "stock (channels first)": convolutions(torch.contiguous_format),
        "channels last": convolutions(torch.channels_last),
        "gathered": gathered,
    }
    work = size.views * (flops["downsamplers"] + flops["projector"])
    return Work(_views(size), (x, w1, b1, w2, b2, w3), work, moved, 2.0, ways | found, missing)


def projector_kernel(size: Size) -> tuple[dict[str, Way], dict[str, str]]:
    """Our ways of the projector: `ops/projector.py` with each of its kernels, then the linear layer."""
    try:
        module = importlib.import_module("megatron_vl.ops.projector")
    except ImportError as error:
        return {}, {"ours": str(error)}
    reason = library.why_not(size.device)
    if reason is not None:
        return {}, {"ours": reason}

    def by(kernel: str) -> Way:
        def run(x, w1, b1, w2, b2, w3):
            library.choose_kernels("required", size.device)
            module.use_projector(kernel)
            x = module.downsample(module.downsample(x, w1.flatten(1), b1), w2.flatten(1), b2)
            return F.linear(x, w3)

        return run

    return {f"ours, {kernel}": by(kernel) for kernel in module.KERNELS}, {}


def bias_quick_gelu(size: Size) -> Work:
    """``quick_gelu(x + bias)`` over ``[s, b, f]``."""
    f = size.model.vision.ffn_hidden_size
    x, bias = size.random(size.grid**2, size.views, f), size.random(f)
    ways = {"torch": lambda x, bias: quick_gelu(x + bias)}
    found = kernel(size, "bias_quick_gelu", lambda operator: operator)
    return _element_wise(size, (x, bias), 2 * _bytes(x), 1.5, ways, *found)


def layer_scale_residual(size: Size) -> Work:
    """``residual + gamma * (x + bias)`` over ``[s, b, h]``."""
    inputs = _residual_inputs(size)
    ways = {"torch": lambda x, bias, gamma, residual: residual + gamma * (x + bias)}
    found = kernel(size, "scale_residual", lambda operator: operator)
    return _element_wise(size, inputs, 3 * _bytes(inputs[0]), 4 / 3, ways, *found)


def layer_scale_residual_norm(size: Size) -> Work:
    """The same, and the layer norm behind it; both are results."""
    x, bias, gamma, residual = _residual_inputs(size)
    width = size.model.vision.hidden_size
    weight, shift = size.random(width), size.random(width)

    eps = size.model.vision.layernorm_epsilon

    def torch_way(x, bias, gamma, residual, weight, shift):
        y = residual + gamma * (x + bias)
        return y, F.layer_norm(y, (width,), weight, shift, eps)

    found = kernel(size, "scale_residual_norm", lambda operator: lambda *inputs: operator(*inputs, eps)[:2])
    inputs = (x, bias, gamma, residual, weight, shift)
    return _element_wise(size, inputs, 4 * _bytes(x), 5 / 4, {"torch": torch_way}, *found)


def rope_2d(size: Size) -> Work:
    """q, k and v apart from ``[s, b, heads, 3 d]``, q and k rotated; Megatron-Core's way first."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    vision = size.model.vision
    qkv = size.random(size.grid**2, size.views, vision.num_attention_heads, 3 * vision.head_dim)
    angles = tower_angles(vision, size.grid).to(size.device, torch.float32)
    cos, sin = (t.to(size.dtype)[:, None, None] for t in (angles.cos(), angles.sin()))
    table = torch.stack([angles[:, ::2].cos(), angles[:, ::2].sin()], dim=-1)

    def megatron(qkv):
        q, k, v = qkv.chunk(3, dim=-1)
        turned = (
            _apply_rotary_pos_emb_bshd(x, angles[:, None, None], rotary_interleaved=True) for x in (q, k)
        )
        return *turned, v

    def pairs(qkv):
        q, k, v = qkv.chunk(3, dim=-1)
        return turned_pairs(q, cos, sin), turned_pairs(k, cos, sin), v

    found = kernel(
        size, "rope_2d", lambda operator: lambda qkv: tuple(x.transpose(0, 1) for x in operator(qkv, table))
    )
    ways = {"torch (Megatron-Core)": megatron, "torch (pairs)": pairs}
    return _element_wise(size, (qkv,), 2 * _bytes(qkv), 1.0, ways, *found)


def patches(size: Size) -> Work:
    """Bytes ``[n, 3, S, S]`` to normalised patches ``[s, n, 3 * p * p]``; no gradient."""
    vision = size.model.vision
    side, patch, grid = size.grid * vision.patch_size, vision.patch_size, size.grid
    pixels = torch.randint(0, 256, (size.views, 3, side, side), dtype=torch.uint8, device=size.device)
    mean, deviation = (torch.tensor(v, device=size.device) for v in (CLIP_MEAN, CLIP_STD))

    def plain(pixels):
        x = ((pixels.float() / 255 - mean[:, None, None]) / deviation[:, None, None]).to(size.dtype)
        x = x.view(size.views, 3, grid, patch, grid, patch)
        return x.permute(2, 4, 0, 1, 3, 5).reshape(grid**2, size.views, -1)

    half = size.dtype == torch.bfloat16
    found = kernel(
        size, "patchify", lambda operator: lambda pixels: operator(pixels, mean, deviation, patch, half)
    )
    element = torch.finfo(size.dtype).bits // 8
    return _element_wise(size, (pixels,), pixels.numel() * (1 + element), 0.0, {"torch": plain}, *found)


def packed_attention(size: Size) -> Work:
    """Causal attention of a packed row of unequal documents, against its documents one by one."""
    text, lengths = size.model.text, document_lengths(size.tokens)
    bounds = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    q = size.random(size.tokens, text.num_attention_heads, text.kv_channels)
    k, v = (size.random(size.tokens, text.num_query_groups, text.kv_channels) for _ in range(2))
    scale = 1 / math.sqrt(text.kv_channels)

    def apart(q, k, v):
        outs = []
        for a, b in zip(bounds, bounds[1:]):
            one = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            out = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def packed(q, k, v):
        return attention(q, k, v, bounds, scale, True, Alone(), "p2p")

    flops = 2 * text.num_attention_heads * text.kv_channels * sum(n**2 for n in lengths)
    shape = f"{size.tokens:,} tokens in {len(lengths)} documents"
    return Work(
        shape,
        (q, k, v),
        flops,
        2 * _bytes(q) + 2 * _bytes(k),
        2.5,
        {"documents apart": apart, "ours": packed},
    )


def cross_entropy(size: Size) -> Work:
    """Head and loss of all tokens: the chunked one against all logits at once."""
    text = size.model.text
    tokens = min(size.tokens, 8192)  # plain logits of more do not fit beside their gradient
    hidden = size.random(tokens, 1, text.hidden_size)
    weight = size.random(text.vocab_size, text.hidden_size, scale=text.hidden_size**-0.5)
    labels = torch.randint(text.vocab_size, (1, tokens), device=size.device)
    head = HeadShard(text.vocab_size, Alone(), False, loss_chunk_tokens(text.vocab_size))

    def plain(hidden, weight):
        return F.cross_entropy(F.linear(hidden[:, 0], weight).float(), labels[0], reduction="none")

    def chunked(hidden, weight):
        return score_tokens(hidden, weight, labels, head, Scoring()).losses[0]

    flops = 2.0 * tokens * text.hidden_size * text.vocab_size
    shape = f"{tokens:,} tokens, {text.vocab_size:,} words"
    return Work(
        shape, (hidden, weight), flops, _bytes(hidden, weight), 2.0, {"all logits": plain, "ours": chunked}
    )


OPERATIONS: dict[str, Callable[[Size], Work]] = {
    "projector": projector,
    "bias_quick_gelu": bias_quick_gelu,
    "layer_scale_residual": layer_scale_residual,
    "layer_scale_residual_norm": layer_scale_residual_norm,
    "rope_2d": rope_2d,
    "patches": patches,
    "packed_attention": packed_attention,
    "cross_entropy": cross_entropy,
}
OF_VIEWS = tuple(name for name in OPERATIONS if name not in ("packed_attention", "cross_entropy"))


def document_lengths(tokens: int) -> list[int]:
    """Lengths between an eighth and twice the mean of sixteen documents; they fill the row."""
    mean = max(tokens // 16, 1)
    lengths, left, number = [], tokens, 0
    while left:
        length = min(left, max(1, mean * (1 + number * 5 % 16) // 8))
        lengths.append(length)
        left, number = left - length, number + 1
    return lengths


def _element_wise(
    size: Size, inputs: Tensors, nbytes: float, backward: float, ways: dict[str, Way], found: dict[str, Way],
    missing: dict[str, str],
) -> Work:  # fmt: skip
    if size.device.type == "cuda":
        ways = ways | {"torch.compile": torch.compile(next(iter(ways.values())), dynamic=False)}
    return Work(_views(size), inputs, 0.0, nbytes, backward, ways | found, missing)


def _residual_inputs(size: Size) -> Tensors:
    width = size.model.vision.hidden_size
    x, residual = (size.random(size.grid**2, size.views, width) for _ in range(2))
    return x, size.random(width), size.random(width), residual


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _views(size: Size) -> str:
    return f"{size.views} x {size.grid}x{size.grid}"


KINDS: Sequence[int] = (GLOBAL, CROP)
