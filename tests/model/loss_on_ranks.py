"""A train step with the fused loss, and with Megatron-Core's head and cross entropy in its place."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.model.attention import packed_params
from megatron_vl.model.step3_vl import StageInputs, Step3VL
from megatron_vl.parallel.context_parallel import take_local
from megatron_vl.parity.on_rank import Seen
from megatron_vl.parity.reference import Batches
from tests.model.on_ranks import gradients_on_rank


def plain_forward(model: Step3VL, inputs: StageInputs) -> torch.Tensor:
    """Whole logits and ``vocab_parallel_cross_entropy``, all within Megatron-Core's model."""
    labels = take_local(inputs.labels, inputs.bounds, model.groups.cp)
    return model.language_model(
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        decoder_input=model._embed(inputs) if model.pre_process else None,
        labels=labels.clamp(min=0) if model.post_process else None,
        packed_seq_params=packed_params(inputs.bounds, inputs.lengths, inputs.input_ids.device),
    )


def step_on_rank(config: RunConfig, batches: Batches, chunk: int | None) -> Seen:
    """Gradients of one step; ``rows[micro-batch, "ce"]``: losses of the scored tokens. chunk None: the plain loss."""
    losses: list[torch.Tensor] = []
    forward = plain_forward if chunk is None else Step3VL.forward

    def recorded(model: Step3VL, inputs: StageInputs) -> torch.Tensor:
        out = forward(model, inputs)
        if model.post_process:
            labels = take_local(inputs.labels, inputs.bounds, model.groups.cp)
            losses.append(out.detach()[labels >= 0])
        return out

    size = patch("megatron_vl.model.step3_vl.loss_chunk_tokens", lambda words, configured: chunk)
    with patch.object(Step3VL, "forward", recorded), size if chunk else nullcontext():
        seen = gradients_on_rank(config, batches)
    seen.rows = {(number, "ce"): values for number, values in enumerate(losses)}
    return seen
