"""The PE-lang tower with its two downsamplers (spec: ``vision_model`` of the released checkpoint).

patch conv -> + position table -> ln_pre -> pre-norm blocks with RoPE-2D and layer scale -> two 3x3 stride-2
convolutions. All matrix products go through Megatron-Core's parallel linears, the convolutions as gathered
patches times a matrix, so that placement ``tensor`` shards every one of them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.config.model import VisionConfig
from megatron_vl.model.backend import Backend, tower_spec
from megatron_vl.ops.pixels import normalised


class LayerScaleResidual(torch.nn.Module):
    """``residual + gamma * (x + bias)`` in Megatron-Core's bias-dropout-add slot; gamma is per channel."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype))

    def forward(self, training: bool, fused: bool):
        del training, fused  # one form only; csrc/ may bring a fused one

        def add(x_with_bias, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            assert dropout == 0.0, "the tower has no dropout"
            x, bias = x_with_bias
            # Megatron-Core calls the slot under enable_grad even in evaluation and in the first pass of a
            # recomputed chunk, which would keep a graph alive; what comes in knows better
            with torch.set_grad_enabled(x.requires_grad or residual.requires_grad):
                return residual + self.gamma * (x if bias is None else x + bias)

        return add


@lru_cache(maxsize=8)
def rotary_angles(grid: int, head_dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Angles of RoPE-2D, fp32 ``[grid * grid, 1, 1, head_dim]``, patches in row-major order.

    The first half of the head follows the column, the second half the row; within a half each angle stands
    twice, for an adjacent pair. Positions are integers, never rescaled (spec/model.md 2.1).
    """
    half = head_dim // 2
    inv_freq = base ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    per_position = (torch.arange(grid, dtype=torch.float64)[:, None] * inv_freq).repeat_interleave(2, dim=-1)
    column = per_position[None, :, :].expand(grid, grid, half)
    row = per_position[:, None, :].expand(grid, grid, half)
    angles = torch.cat([column, row], dim=-1).reshape(grid * grid, 1, 1, head_dim)
    return angles.to(device=device, dtype=torch.float32)


def patchify(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """``[n, 3, H, W] -> [(H / patch) * (W / patch), n, 3 * patch * patch]``, channels then rows then columns."""
    n, c, height, width = pixels.shape
    x = pixels.reshape(n, c, height // patch, patch, width // patch, patch)
    return x.permute(2, 4, 0, 1, 3, 5).reshape(-1, n, c * patch * patch)


def gather_3x3(tokens: torch.Tensor) -> torch.Tensor:
    """Neighbourhoods of a 3x3, stride 2, padding 1 convolution on a square grid of tokens.

    ``[g * g, n, c] -> [ceil(g / 2)^2, n, c * 9]``; the 9 taps of a channel stand together, as in the flattened
    weight of ``Conv2d``, so that splitting the input channels splits contiguous columns.
    """
    count, n, c = tokens.shape
    grid = round(count**0.5)
    image = tokens.permute(1, 2, 0).reshape(n, c, grid, grid)
    return F.unfold(image, kernel_size=3, padding=1, stride=2).permute(2, 0, 1)


class VisionEncoder(MegatronModule):
    """Views of one size in, downsampled features out.

    pg_collection: ``tp`` is the tensor-parallel group in placement ``tensor`` and this rank alone in ``data``;
    ``cp`` and ``pp`` are this rank alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision: VisionConfig,
        backend: Backend,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.vision = vision
        width, tp = vision.hidden_size, pg_collection.tp
        linear = dict(config=config, init_method=config.init_method, tp_group=tp)
        self.conv1 = ColumnParallelLinear(
            3 * vision.patch_size**2, width, bias=False, gather_output=True, **linear
        )
        # use_cpu_initialization decides where Megatron-Core puts its weights; the table follows the first one
        self.positional_embedding = torch.nn.Parameter(
            torch.empty(
                vision.global_grid**2, width, dtype=config.params_dtype, device=self.conv1.weight.device
            )
        )
        self.ln_pre = backend.norm(config=config, hidden_size=width, eps=config.layernorm_epsilon)
        scale = ModuleSpec(LayerScaleResidual, params={"hidden_size": width, "dtype": config.params_dtype})
        self.transformer = TransformerBlock(
            config,
            tower_spec(vision.num_layers, backend, scale),
            post_layer_norm=False,
            pg_collection=pg_collection,
        )
        self.vit_downsampler1 = ColumnParallelLinear(9 * width, 2 * width, gather_output=False, **linear)
        self.vit_downsampler2 = RowParallelLinear(
            9 * 2 * width, 4 * width, bias=True, input_is_parallel=True, skip_bias_add=False, **linear
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 3, side, side] -> [tokens, n, 4 * width]``; side is that of the global view or of a crop.

        pixels: floats that are normalised, or bytes.
        """
        grid = pixels.shape[-1] // self.vision.patch_size
        hidden = self.embed(pixels, grid)
        angles = rotary_angles(grid, self.vision.head_dim, self.vision.rotary_base, pixels.device)
        hidden = self.transformer(hidden, attention_mask=None, rotary_pos_emb=angles)
        hidden, _ = self.vit_downsampler1(gather_3x3(hidden))
        hidden, _ = self.vit_downsampler2(gather_3x3(hidden))
        return hidden

    def embed(self, pixels: torch.Tensor, grid: int) -> torch.Tensor:
        """Patch embedding plus position table, after ``ln_pre``: ``[grid * grid, n, width]``."""
        patches, _ = self.conv1(patchify(normalised(pixels, self.conv1.weight.dtype), self.vision.patch_size))
        return self.ln_pre(patches + self.position_table(grid)[:, None, :])

    def position_table(self, grid: int) -> torch.Tensor:
        """The position table for ``grid``, resized bilinearly without antialiasing: ``[grid * grid, width]``."""
        table, full = self.positional_embedding, self.vision.global_grid
        if grid == full:
            return table
        image = table.float().reshape(1, full, full, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(grid, grid), mode="bilinear", align_corners=False, antialias=False)
        return image.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(table.dtype)
