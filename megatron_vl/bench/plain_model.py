"""STEP3-VL as plain PyTorch on one device: what a step of ours is timed against.

Written as one would without a framework: `nn.Linear`, `scaled_dot_product_attention`, `Conv2d`, logits of all tokens,
`cross_entropy`, `torch.optim.AdamW`. It shares no module with the package; parameters carry the released names with
dots as underscores. Dense rows only, all views whole, nothing recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vl.config.model import ModelConfig, TextConfig, VisionConfig
from megatron_vl.plan.rope import attention_scale, rope_frequencies
from megatron_vl.plan.vision_share import CROP, GLOBAL


def turned_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent pairs of channels: ``[n, heads, s, d]`` with ``[s, d]``."""
    other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + other * sin


def turned_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel i with channel i + d / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def tower_angles(vision: VisionConfig, grid: int) -> Tensor:
    """Angles of RoPE-2D, ``[grid^2, head]``: the first half of a head turns with the column, the second with the row;
    each angle stands twice, for an adjacent pair."""
    half = vision.head_dim // 2
    frequencies = vision.rotary_base ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    along = (torch.arange(grid)[:, None] * frequencies).repeat_interleave(2, dim=-1)
    return torch.cat([along.repeat(grid, 1), along.repeat_interleave(grid, dim=0)], dim=-1)


class TowerBlock(nn.Module):
    """Pre-norm block with layer scale; full attention, RoPE-2D, quick_gelu."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        width, eps = vision.hidden_size, vision.layernorm_epsilon
        self.heads = vision.num_attention_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ls_1, self.ls_2 = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.c_fc = nn.Linear(width, vision.ffn_hidden_size)
        self.c_proj = nn.Linear(vision.ffn_hidden_size, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[n, s, width]``."""
        n, s, width = x.shape
        q, k, v = self.in_proj(self.ln_1(x)).view(n, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = turned_pairs(q, cos, sin), turned_pairs(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, width)
        x = x + self.ls_1 * self.out_proj(y)
        y = self.c_fc(self.ln_2(x))
        return x + self.ls_2 * self.c_proj(y * torch.sigmoid(1.702 * y))


class PlainTower(nn.Module):
    """Views of one size to features of the decoder's width: tower, downsamplers, projector."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        vision = model.vision
        width = vision.hidden_size
        self.vision = vision
        self.conv1 = nn.Conv2d(3, width, vision.patch_size, vision.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(vision.global_grid**2, width))
        self.ln_pre = nn.LayerNorm(width, vision.layernorm_epsilon)
        self.blocks = nn.ModuleList(TowerBlock(vision) for _ in range(vision.num_layers))
        self.vit_downsampler1 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.vit_downsampler2 = nn.Conv2d(2 * width, 4 * width, 3, 2, 1)
        self.projector = nn.Linear(4 * width, model.text.hidden_size, bias=False)
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, pixels: Tensor) -> Tensor:
        """``[n, 3, side, side] -> [n * tokens, h]``."""
        x = self.conv1(pixels)
        n, width, grid, _ = x.shape
        x = self.ln_pre(x.flatten(2).transpose(1, 2) + self.table(grid))
        cos, sin = self.angles(grid, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = x.transpose(1, 2).reshape(n, width, grid, grid)
        x = self.vit_downsampler2(self.vit_downsampler1(x))
        return self.projector(x.flatten(2).transpose(1, 2)).flatten(0, 1)

    def table(self, grid: int) -> Tensor:
        """Position table for a grid, ``[grid^2, width]``."""
        full = self.vision.global_grid
        if grid == full:
            return self.positional_embedding
        image = self.positional_embedding.float().view(1, full, full, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(grid, grid), mode="bilinear", align_corners=False)
        return image.flatten(2)[0].t().to(self.positional_embedding.dtype)

    def angles(self, grid: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, ``[grid^2, head]``."""
        if grid not in self._angles:
            angles = tower_angles(self.vision, grid)
            self._angles[grid] = tuple(t.to(like.device, like.dtype) for t in (angles.cos(), angles.sin()))
        return self._angles[grid]


class DecoderLayer(nn.Module):
    """Qwen3 layer: grouped queries, norms of q and k, SwiGLU."""

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        h, d, f, eps = text.hidden_size, text.kv_channels, text.ffn_hidden_size, text.layernorm_epsilon
        self.heads, self.groups, self.channels = text.num_attention_heads, text.num_query_groups, d
        self.scale = attention_scale(d, text.rope_scaling)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(h, eps), nn.RMSNorm(h, eps)
        self.q_norm, self.k_norm = nn.RMSNorm(d, eps), nn.RMSNorm(d, eps)
        self.q_proj = nn.Linear(h, self.heads * d, bias=False)
        self.k_proj = nn.Linear(h, self.groups * d, bias=False)
        self.v_proj = nn.Linear(h, self.groups * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, h, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)
        self.down_proj = nn.Linear(f, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[b, s, h]``."""
        b, s, _ = x.shape
        y = self.input_layernorm(x)
        q = self.q_norm(self.q_proj(y).view(b, s, self.heads, self.channels)).transpose(1, 2)
        k = self.k_norm(self.k_proj(y).view(b, s, self.groups, self.channels)).transpose(1, 2)
        v = self.v_proj(y).view(b, s, self.groups, self.channels).transpose(1, 2)
        q, k = turned_halves(q, cos, sin), turned_halves(k, cos, sin)
        grouped = self.heads != self.groups
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, s, -1))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class PlainModel(nn.Module):
    """The whole model. Weights are set by `take`."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        text = model.text
        self.model = model
        self.tower = PlainTower(model)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(text) for _ in range(text.num_layers))
        self.norm = nn.RMSNorm(text.hidden_size, text.layernorm_epsilon)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self._angles: tuple[Tensor, Tensor] | None = None

    def forward(
        self, ids: Tensor, labels: Tensor, kinds: Sequence[int], crops: Tensor, whole: Tensor
    ) -> Tensor:
        """Mean loss over the scored tokens. ids, labels ``[b, S]``, labels shifted; kinds: of the views in stream
        order; crops, whole: pixels by kind, in that order."""
        x = self.embed_tokens(ids)
        if kinds:
            x = self.with_features(x, ids == self.model.tokens.im_patch, kinds, crops, whole)
        cos, sin = self.angles(ids.shape[1], x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)

    def with_features(
        self, x: Tensor, slots: Tensor, kinds: Sequence[int], crops: Tensor, whole: Tensor
    ) -> Tensor:
        """Embeddings with the features of the views in their slots, in stream order."""
        vision, places, start = self.model.vision, {CROP: [], GLOBAL: []}, 0
        for kind in kinds:
            end = start + (vision.global_tokens if kind == GLOBAL else vision.crop_tokens)
            places[kind].append(torch.arange(start, end))
            start = end
        rows, positions = slots.nonzero(as_tuple=True)
        for kind, pixels in ((CROP, crops), (GLOBAL, whole)):
            if places[kind]:
                mine = torch.cat(places[kind]).to(x.device)
                x = x.index_put((rows[mine], positions[mine]), self.tower(pixels.to(x.dtype)))
        return x

    def angles(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the decoder's rotary embedding, ``[length, head]``."""
        if self._angles is None or self._angles[0].shape[0] != length:
            text = self.model.text
            frequencies = rope_frequencies(text.kv_channels, text.rotary_base, text.rope_scaling)
            angles = torch.arange(length)[:, None] * torch.tensor(frequencies)
            angles = torch.cat([angles, angles], dim=-1)
            self._angles = tuple(t.to(like.device, like.dtype) for t in (angles.cos(), angles.sin()))
        return self._angles

    def released_names(self) -> dict[str, nn.Parameter]:
        """Every parameter under its released name."""
        return {released(name): parameter for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def take(self, source: Callable[[str], Tensor]) -> PlainModel:
        """Fill the weights. source: released name -> whole tensor."""
        for name, parameter in self.released_names().items():
            parameter.copy_(source(name).view(parameter.shape))
        return self


def released(name: str) -> str:
    """Released name of a parameter of `PlainModel`."""
    if name.startswith("tower.projector."):
        return "vit_large_projector.weight"
    if name.startswith("tower."):
        name = name.replace("tower.", "vision_model.").replace(".blocks.", ".transformer.resblocks.")
        for ours, theirs in (("in_proj.", "in_proj_"), ("out_proj.", "out_proj.")):
            name = name.replace(f".{ours}", f".attn.{theirs}")
        for ours in ("c_fc", "c_proj"):
            name = name.replace(f".{ours}.", f".mlp.{ours}.")
        return f"{name}.gamma" if name.endswith((".ls_1", ".ls_2")) else name
    if name.startswith("lm_head."):
        return name
    for ours in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        name = name.replace(f".{ours}.", f".self_attn.{ours}.")
    for ours in ("gate_proj", "up_proj", "down_proj"):
        name = name.replace(f".{ours}.", f".mlp.{ours}.")
    return f"model.{name}"


def make_optimizer(
    model: PlainModel, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, in PyTorch's own choice of implementation."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
