"""Rules of activation recomputation."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import ParallelConfig, RecomputeConfig
from megatron_vl.errors import Problem
from megatron_vl.plan.stages import balanced_layers, check_stages


def check_recompute(
    model: ModelConfig, parallel: ParallelConfig, recompute: RecomputeConfig
) -> Iterator[Problem]:
    """Groups of recomputed layers must divide the layers of every chunk.

    Megatron-Core 0.16.1 takes whole groups only (`TransformerBlock._checkpointed_forward`): a last group that is not
    full ends the first step with an IndexError.
    """
    blocks = model.vision.num_layers
    if recompute.vision == "full" and blocks % recompute.vision_num_layers:
        yield _problem("vision", recompute.vision_num_layers, f"model.vision.num_layers = {blocks}", [blocks])
    explicit, pp, vpp = (
        parallel.pipeline_decoder_layers, parallel.pipeline_model_parallel_size, parallel.chunks_per_stage,
    )  # fmt: skip
    if recompute.decoder != "full" or check_stages(model.text.num_layers, pp, vpp, explicit):
        return
    counts = explicit if explicit is not None else balanced_layers(model.text.num_layers, pp * vpp)
    if any(count % recompute.decoder_num_layers for count in counts):
        told = f"the decoder layers of every stage, {', '.join(map(str, counts))}"
        yield _problem("decoder", recompute.decoder_num_layers, told, counts)


def _problem(part: str, size: int, what: str, counts: list[int]) -> Problem:
    fitting = [n for n in range(1, max(counts) + 1) if all(count % n == 0 for count in counts)]
    path = f"recompute.{part}_num_layers"
    return Problem(path, size, f"must divide {what}", f"choose one of {', '.join(map(str, fitting))}")
