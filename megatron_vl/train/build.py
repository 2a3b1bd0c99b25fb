"""From the description of a run to its live parts: model chunks, DDP, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.checkpoint.hf_load import load_weights
from megatron_vl.config.schema import RunConfig
from megatron_vl.model.backend import Backend, choose_backend, in_fp8
from megatron_vl.model.step3_vl import Step3VL
from megatron_vl.model.tower import Tower
from megatron_vl.model.transformer_configs import Numerics, decoder_config, vision_config
from megatron_vl.ops.library import choose_kernels
from megatron_vl.ops.projector import use_projector
from megatron_vl.optim.build import build_optimizer
from megatron_vl.parallel.data_parallel import ChunkDataParallel
from megatron_vl.parallel.runtime import Runtime, parameter_dtype
from megatron_vl.plan.fp8 import transformer_config_fields
from megatron_vl.plan.overlap import NONE, bucket_elements, overlap_of
from megatron_vl.plan.stages import Stage, plan_stages, tower_of_rank


@dataclass
class Parts:
    """The live parts of a run on one rank.

    chunks: everything that has weights, DDP-wrapped: one per virtual stage, and the tower last where it stands beside
    them. stages: the description of each. optimizer: None for evaluation. fused_kernels: whether those of csrc/ are
    used, in words.
    """

    config: RunConfig
    runtime: Runtime
    backend: Backend
    decoder_config: TransformerConfig
    stages: list[Stage]
    chunks: list[ChunkDataParallel]
    dtype: torch.dtype
    optimizer: MegatronOptimizer | None
    fused_kernels: str

    @property
    def tower(self) -> torch.nn.Module | None:
        """The chunk that is the tower, in placement ``all``."""
        return self.chunks[-1] if isinstance(self.chunks[-1].module, Tower) else None

    @property
    def pipeline(self) -> list[torch.nn.Module]:
        """The chunks that are stages of the pipeline."""
        return self.chunks if self.tower is None else self.chunks[:-1]


def build(
    config: RunConfig,
    runtime: Runtime,
    source: Callable[[str], torch.Tensor] | None,
    with_optimizer: bool = True,
    value_head: bool = False,
) -> Parts:
    """Build this rank's part of the model and fill it.

    source: released tensor name -> whole tensor (a checkpoint directory, or fresh weights); None: a checkpoint is
    restored afterwards, nothing is drawn. value_head: build a critic, which has a value head instead of the output
    projection, and no tower: it is fed the features of its actor's.
    """
    parallel, model = config.parallel, config.model
    backend = choose_backend(
        parallel.layer_backend, parallel.cp_comm_type, parallel.flash_attention, parallel.norms
    )
    backend = in_fp8(backend, config.precision, model.text.num_layers, runtime.device)
    fused_kernels = choose_kernels(parallel.fused_kernels, runtime.device)
    use_projector(parallel.projector_kernel)
    dtype = parameter_dtype(config.precision.params, runtime.device)
    numerics = Numerics(dtype, on_cpu=runtime.device.type == "cpu")
    layout, beside = runtime.layout, runtime.layout.tower_beside and not value_head
    stages = plan_stages(
        model.text.num_layers, layout.pp, layout.vpp, parallel.pipeline_decoder_layers, layout.tower_beside
    )
    engine = backend.name == "transformer_engine"  # its layers read their config, the torch ones the backend
    fp8 = [transformer_config_fields(config.precision, vision) if engine else {} for vision in (False, True)]
    decoder = decoder_config(model, parallel, config.recompute, numerics, stages, fp8[0])
    vision = vision_config(model, parallel, config.recompute, numerics, fp8[1])
    if value_head:
        stages = [[replace(stage, has_vision=False) for stage in of_rank] for of_rank in stages]
    mine = stages[runtime.coords.pp]
    numbers = range(len(mine)) if len(mine) > 1 else [None]
    options = (config.train.loss_chunk_tokens, config.recompute.vision_chunk_views, config.recompute.offload)
    bare = [
        Step3VL(model, decoder, vision, stage, backend, runtime.groups, number, *options, value_head)
        for number, stage in zip(numbers, mine)
    ]
    if beside:
        mine = [*mine, tower_of_rank(runtime.coords.pp)]
        bare.append(Tower(model, vision, backend, runtime.groups))
    for chunk in bare:
        chunk.to(runtime.device)
    tp = (layout.tp, runtime.coords.tp)
    load_weights(bare, mine, model, source, tp, tp if parallel.vision_placement == "tensor" else (1, 0))
    distributed = parallel.use_distributed_optimizer
    pipeline = bare[:-1] if beside else bare
    chunks = [_wrap(chunk, decoder, runtime, config, first=i == 0) for i, chunk in enumerate(pipeline)]
    tower, copies = None, runtime.groups.of_copies() if beside else None
    if beside:  # its gradients come at once, behind the pipeline: there is nothing to send beside
        tower = ChunkDataParallel(vision, bare[-1], NONE, None, distributed, one_bucket=True, groups=copies)
        if not distributed and (runtime.coords.pp or runtime.coords.tp):
            for parameter in tower.parameters():
                parameter.shared = True  # in the norm of gradients another rank of the replica counts it
    optimizer = None
    if with_optimizer:
        optimizer = build_optimizer(config.optim, chunks, dtype, distributed, tower, copies)
    everything = [*chunks, tower] if beside else chunks
    return Parts(config, runtime, backend, decoder, mine, everything, dtype, optimizer, fused_kernels)


def _wrap(
    chunk: Step3VL, decoder: TransformerConfig, runtime: Runtime, config: RunConfig, first: bool
) -> ChunkDataParallel:
    """The chunk with gradient buffers; the tower's are summed behind the backward pass, since it may not run."""
    parallel, copies = config.parallel, runtime.layout.dp * runtime.layout.cp
    on_cpu = runtime.device.type == "cpu"
    head = None if chunk.head is None else (chunk.decoder, chunk.language_model.output_layer.weight)
    return ChunkDataParallel(
        decoder,
        chunk,
        overlap_of(parallel, copies, on_cpu),
        bucket_elements(parallel, copies, on_cpu),
        parallel.use_distributed_optimizer,
        one_bucket=not first,
        late=chunk.vision_parameters(),
        directly=head,
        within=() if chunk.vision_model is None else chunk.vision_model.read_without_call(),
    )
