"""The PE-lang tower with its two downsamplers (spec: ``vision_model`` of the released checkpoint).

patch conv -> + position table -> ln_pre -> pre-norm blocks with RoPE-2D and layer scale -> two 3x3 stride-2
convolutions. All matrix products go through Megatron-Core's parallel linears, or are cut like them (the
convolutions: downsampler.py), so that placement ``tensor`` shards every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.config.model import VisionConfig
from megatron_vl.model.backend import Backend
from megatron_vl.model.downsampler import FirstDownsampler, SecondDownsampler
from megatron_vl.model.tower_layer import tower_spec
from megatron_vl.ops.pixels import embedding_patches
from megatron_vl.ops.rotary import rotary_table


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
        self.transformer = TransformerBlock(
            config,
            tower_spec(vision.num_layers, backend, width, config.params_dtype),
            post_layer_norm=False,
            pg_collection=pg_collection,
        )
        self.vit_downsampler1 = FirstDownsampler(width, 2 * width, config, tp)
        self.vit_downsampler2 = SecondDownsampler(2 * width, 4 * width, config, tp)

    def read_without_call(self) -> Iterator[tuple[torch.nn.Module, torch.nn.Parameter]]:
        """(module, weight of a module below it that its forward pass reads without calling that module)."""
        yield self, self.conv1.weight
        for layer in self.transformer.layers:
            yield from ((layer, weight) for weight in layer.read_without_call())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 3, side, side] -> [tokens, n, 4 * width]``; side is that of the global view or of a crop.

        pixels: floats that are normalised, or bytes.
        """
        grid = pixels.shape[-1] // self.vision.patch_size
        hidden = self.embed(pixels, grid)
        table = rotary_table(grid, self.vision.head_dim, self.vision.rotary_base, pixels.device)
        hidden = self.transformer(hidden, attention_mask=None, rotary_pos_emb=table)
        return self.vit_downsampler2(self.vit_downsampler1(hidden))

    def embed(self, pixels: torch.Tensor, grid: int) -> torch.Tensor:
        """Patch embedding plus position table, after ``ln_pre``: ``[grid * grid, n, width]``."""
        patches = embedding_patches(pixels, self.conv1.weight, self.vision.patch_size)
        return self.ln_pre(self.patch_embedding(patches) + self.position_table(grid)[:, None, :])

    def patch_embedding(self, patches: torch.Tensor) -> torch.Tensor:
        """``conv1``: ``[s, n, 3 * p * p] -> [s, n, width]``.

        Not by calling the module: Megatron-Core's linear computes the gradient of its input always, and that of the
        pixels nobody wants (in the tiny model a tenth of a step).
        """
        own = F.linear(patches, self.conv1.weight)
        return gather_from_tensor_model_parallel_region(own, group=self.conv1.tp_group)

    def position_table(self, grid: int) -> torch.Tensor:
        """The position table for ``grid``, resized bilinearly without antialiasing: ``[grid * grid, width]``."""
        table, full = self.positional_embedding, self.vision.global_grid
        if grid == full:
            return table
        image = table.float().reshape(1, full, full, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(grid, grid), mode="bilinear", align_corners=False, antialias=False)
        return image.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(table.dtype)
