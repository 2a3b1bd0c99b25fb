"""One pipeline stage of STEP3-VL: tower and projector (first stage), decoder layers, head (last stage).

The critic of PPO is the same class with a value head.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_vl.config.model import ModelConfig
from megatron_vl.model.attention import packed_params
from megatron_vl.model.backend import Backend, decoder_spec
from megatron_vl.model.fusion import image_slots, put_features
from megatron_vl.model.heads import ValueHead
from megatron_vl.model.offload import Offload
from megatron_vl.model.rope import extend_rope
from megatron_vl.model.tower import build_tower, project
from megatron_vl.ops.cross_entropy import HeadShard, Scoring, TokenScores, score_tokens
from megatron_vl.parallel.context_parallel import take_local
from megatron_vl.parallel.feature_exchange import exchange_features
from megatron_vl.parallel.feature_plan import held_rows, plan_exchange
from megatron_vl.parallel.groups import Groups
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.loss_chunk import loss_chunk_tokens
from megatron_vl.plan.stages import Stage
from megatron_vl.plan.vision_share import share_views


@dataclass(frozen=True)
class OwnFeatures:
    """Features ``[n, h]`` of the positions that this rank holds; batch rows and local positions of them, int64 [n]."""

    features: torch.Tensor
    rows: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class StageInputs:
    """What one stage needs of a micro-batch, on the device. Rows are whole: a stage takes its own slice.

    input_ids, labels: int64 ``[b, S]`` (labels shifted, -100 = not scored). bounds: padded document boundaries of
    a packed row, None for dense rows; lengths: true document lengths. view_kinds: CROP or GLOBAL per view in
    stream order. crop_pixels, global_pixels: ``[n, 3, side, side]``, this rank's share only. features: projected
    features of all views in stream order ``[rows, h]``, on every rank of the first stage; the tower is not run then.
    own: in placement ``all``, on the first stage, what was encoded before the pipeline; None without views.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    bounds: list[int] | None
    lengths: list[int]
    view_kinds: list[int]
    crop_pixels: torch.Tensor
    global_pixels: torch.Tensor
    sample_ids: list[str]
    features: torch.Tensor | None = None
    own: OwnFeatures | None = None


class Step3VL(MegatronModule):
    """A chunk of the model for one (virtual) pipeline stage; its weights come from ``checkpoint/hf_load.py``."""

    def __init__(
        self,
        model: ModelConfig,
        decoder: TransformerConfig,
        vision: TransformerConfig,
        stage: Stage,
        backend: Backend,
        groups: Groups,
        vp_stage: int | None,
        loss_chunk: int | None = None,
        vision_chunk: int | None = None,
        offload: bool = False,
        value_head: bool = False,
    ) -> None:
        """loss_chunk: tokens whose logits the loss holds at once, None = the plan's choice. vision_chunk: views that
        the tower encodes at once, None = all; with a number each chunk is computed again in the backward pass.
        offload: what decoder layers keep for the backward pass waits in host memory. value_head: in the place of the
        output projection; the last stage then gives a value per token.
        """
        super().__init__(decoder)
        self.model, self.stage, self.groups, self.vp_stage = model, stage, groups, vp_stage
        self.vision_chunk = vision_chunk
        self.layout = Layout(
            tp=groups.tp.size(),
            cp=groups.cp.size(),
            sp=decoder.sequence_parallel,
            placement="tensor" if vision.tensor_model_parallel_size > 1 else "data",
        )
        self.pre_process, self.post_process = stage.has_embedding, stage.has_head
        self.share_embeddings_and_output_weights = False
        self.vision_model = self.projector = None
        if stage.has_vision:
            self.vision_model, self.projector = build_tower(model, vision, backend, groups)
        self.language_model = GPTModel(
            config=decoder,
            transformer_layer_spec=decoder_spec(stage.layers, backend),
            vocab_size=padded_vocab(model.text.vocab_size, groups.tp.size()),
            max_sequence_length=model.text.max_position_embeddings,
            pre_process=stage.has_embedding,
            post_process=stage.has_head,
            position_embedding_type="rope",
            rotary_base=model.text.rotary_base,
            scatter_embedding_sequence_parallel=True,  # features go into the slice that is left
            pg_collection=groups.megatron,
            vp_stage=vp_stage,
        )
        text = model.text
        rotary = self.language_model.rotary_pos_emb
        extend_rope(rotary, text.kv_channels, text.rotary_base, text.rope_scaling)
        self.model_type = self.language_model.model_type
        self.head: HeadShard | None = None
        self.value_head: ValueHead | None = None
        if stage.has_head and value_head:
            self.language_model.output_layer = None
            self.value_head = ValueHead(decoder, groups.tp)
        elif stage.has_head:
            words = self.language_model.output_layer.output_size_per_partition
            chunk = loss_chunk_tokens(words, loss_chunk)
            self.head = HeadShard(model.text.vocab_size, groups.tp, decoder.sequence_parallel, chunk)
        self.offload = offload
        self._mask_padded_vocab()
        if model.freeze_decoder:
            self.language_model.requires_grad_(False)

    @property
    def decoder(self) -> torch.nn.Module:
        """Where Megatron-Core's schedules look for the layers."""
        return self.language_model.decoder

    def vision_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters of tower and projector on this stage."""
        modules = [m for m in (self.vision_model, self.projector) if m is not None]
        return [p for module in modules for p in module.parameters()]

    def _mask_padded_vocab(self) -> None:
        """Rows that only pad the vocabulary to a multiple of TP get logit -inf: no probability, no gradient."""
        if self.head is None:
            return
        head = self.language_model.output_layer
        first = self.groups.tp.rank() * head.output_size_per_partition
        real = self.model.text.vocab_size - first
        if real < head.output_size_per_partition:
            keep = max(real, 0)

            def mask(module, inputs, output):
                logits, bias = output
                padding = torch.arange(logits.shape[-1], device=logits.device) >= keep
                return logits.masked_fill(padding, float("-inf")), bias

            head.register_forward_hook(mask)

    def set_input_tensor(self, input_tensor) -> None:
        """Called by the pipeline schedules with the activation of the previous stage."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(self, inputs: StageInputs, scoring: Scoring | None = None) -> torch.Tensor | TokenScores:
        """Hidden states ``[S / cp (/ tp), b, h]``, on the last stage per-token losses ``[b, S / cp]`` fp32.

        With ``scoring`` the last stage returns the losses and what is asked for beside them. With a value head it
        returns the value of the state behind each token, ``[b, S / cp]`` fp32.
        """
        hidden = self._hidden_states(inputs)
        if self.value_head is not None:
            return self.value_head(hidden)
        if self.head is None:
            return hidden
        labels = take_local(inputs.labels, inputs.bounds, self.groups.cp)
        weight = self.language_model.output_layer.weight
        scores = score_tokens(hidden, weight, labels, self.head, scoring or Scoring())
        return scores.losses if scoring is None else scores

    def logits(self, inputs: StageInputs) -> torch.Tensor:
        """Whole logits of a last stage, ``[S / cp, b, vocabulary / tp]``: for checks of short rows."""
        return self.language_model.output_layer(self._hidden_states(inputs))[0]

    def _hidden_states(self, inputs: StageInputs) -> torch.Tensor:
        """``[S / cp (/ tp), b, h]`` after this stage's layers, on the last stage after the final norm too."""
        embeddings = self._embed(inputs) if self.pre_process else None
        keeping = Offload(self.language_model.parameters()).saving() if self.offload else nullcontext()
        whole, self.language_model.post_process = self.language_model.post_process, False
        try:  # Megatron-Core's model stops before its head, which would make all logits at once
            with keeping:
                return self.language_model(
                    input_ids=None,
                    position_ids=None,
                    attention_mask=None,
                    decoder_input=embeddings,
                    packed_seq_params=packed_params(inputs.bounds, inputs.lengths, inputs.input_ids.device),
                )
        finally:
            self.language_model.post_process = whole

    def _embed(self, inputs: StageInputs) -> torch.Tensor:
        """Token embeddings of this rank's positions with image features put in: ``[S / cp (/ tp), b, h]``."""
        ids = take_local(inputs.input_ids, inputs.bounds, self.groups.cp)
        embeddings = self.language_model.embedding(input_ids=ids, position_ids=None)
        if inputs.own is not None:
            return put_features(embeddings, inputs.own.features, inputs.own.rows, inputs.own.positions)
        kinds, vision = inputs.view_kinds, self.model.vision
        tokens = (vision.crop_tokens, vision.global_tokens)
        slots = image_slots(
            inputs.input_ids, self.model.tokens.im_patch, sum(tokens[k] for k in kinds), inputs.sample_ids
        )
        if not kinds:
            return embeddings
        bounds, rank = inputs.bounds or [0, inputs.input_ids.shape[1]], self.groups.tp_cp.rank()
        if inputs.features is not None:
            held, positions = held_rows(slots[1], bounds, self.layout, rank)
            features = inputs.features.index_select(0, torch.from_numpy(held).to(embeddings.device))
            return put_features(embeddings, features, slots[0][held], positions)
        assert self.vision_model is not None, "a model without tower takes features"
        shares = share_views(kinds, self.layout.vision_size, view_costs(self.model))
        plan = plan_exchange(kinds, shares, tokens, slots, bounds, self.layout, rank)
        features = exchange_features(self.encode_views(inputs), plan, self.groups.tp_cp)
        return put_features(embeddings, features, plan.slot_rows, plan.slot_positions)

    def encode_views(self, inputs: StageInputs) -> torch.Tensor:
        """Projected features of this rank's share of the views, crops then globals, ``[rows, h]``.

        A rank whose share is empty has none, and its tower gets no gradient.
        """
        rows = [self._encode(pixels) for pixels in (inputs.crop_pixels, inputs.global_pixels) if len(pixels)]
        if rows:
            return torch.cat(rows)
        dtype = self.language_model.embedding.word_embeddings.weight.dtype
        nothing = torch.zeros((0, self.config.hidden_size), device=inputs.input_ids.device, dtype=dtype)
        # the exchange must have a backward on every rank, or its peers wait for ever
        return nothing.requires_grad_(torch.is_grad_enabled() and self._trains_vision())

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Views of one size, a chunk at a time: ``[n, 3, side, side] -> [n * tokens, h]``.

        A chunk keeps its pixels alone and is computed again in the backward pass, so that the activations of one
        chunk are alive. Reentrant, so that the gradient of each chunk is added up in fp32 by Megatron-Core's DDP
        and not by autograd in the weights' dtype. The tower has no dropout, so no random state is kept.
        """
        if self.vision_chunk is None:
            return self._project(pixels)
        again = torch.is_grad_enabled() and not self.model.freeze_vision
        if not again:  # a frozen tower keeps no activations
            return torch.cat([self._project(chunk) for chunk in pixels.split(self.vision_chunk)])
        anchor = torch.zeros((), device=pixels.device, requires_grad=True)  # pixels require no gradient
        rows = [
            checkpoint(self._project, chunk, anchor, use_reentrant=True, preserve_rng_state=False)
            for chunk in pixels.split(self.vision_chunk)
        ]
        return torch.cat(rows)

    def _project(self, pixels: torch.Tensor, anchor: torch.Tensor | None = None) -> torch.Tensor:
        """``[n, 3, side, side] -> [n * tokens, h]``, view by view. anchor: makes a checkpoint have a backward."""
        del anchor
        return project(self.vision_model, self.projector, pixels, self.model.freeze_vision)

    def _trains_vision(self) -> bool:
        return any(p.requires_grad for p in self.vision_parameters())


def padded_vocab(vocab_size: int, tensor_parallel: int) -> int:
    """Vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel
