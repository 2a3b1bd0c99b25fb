"""Tower and projector: as part of the first stage, or (placement ``all``) beside the pipeline on every rank."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.config.model import ModelConfig
from megatron_vl.model.backend import Backend
from megatron_vl.model.projector import Projector
from megatron_vl.model.vision_encoder import VisionEncoder
from megatron_vl.parallel.groups import Groups


def build_tower(
    model: ModelConfig, vision: TransformerConfig, backend: Backend, groups: Groups
) -> tuple[VisionEncoder, Projector]:
    """Tower and projector of this rank, sharded over TP as the configuration of the tower says; frozen as the model."""
    alone = groups.alone
    tp = groups.tp if vision.tensor_model_parallel_size > 1 else alone
    encoder = VisionEncoder(vision, model.vision, backend, ProcessGroupCollection(tp=tp, cp=alone, pp=alone))
    projector = Projector(vision, model.text.hidden_size, tp)
    if model.freeze_vision:
        encoder.requires_grad_(False)
    if model.freeze_projector:
        projector.requires_grad_(False)
    return encoder, projector


def project(encoder: VisionEncoder, projector: Projector, pixels: torch.Tensor, frozen: bool) -> torch.Tensor:
    """Views of one size to projected features, view by view: ``[n, 3, side, side] -> [n * tokens, h]``.

    frozen: the tower keeps nothing for a backward pass, whatever the projector does.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        features = encoder(pixels)
    return projector(features).transpose(0, 1).flatten(0, 1)


class Tower(MegatronModule):
    """Tower and projector whole on this rank, beside its stages. Its weights are named as in a stage that has them."""

    def __init__(
        self, model: ModelConfig, vision: TransformerConfig, backend: Backend, groups: Groups
    ) -> None:
        super().__init__(vision)
        self.model = model
        self.vision_model, self.projector = build_tower(model, vision, backend, groups)

    def vision_parameters(self) -> list[torch.nn.Parameter]:
        """All of its parameters."""
        return list(self.parameters())

    @property
    def trained(self) -> bool:
        """Whether any of it is."""
        return any(p.requires_grad for p in self.parameters())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 3, side, side] -> [n * tokens, h]`` of views of one size."""
        return project(self.vision_model, self.projector, pixels, self.model.freeze_vision)
