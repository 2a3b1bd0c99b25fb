"""What one rank of a layout holds and exchanges: as planned here, to be compared with what is built of it.

`train/dry_run.py` builds the rank; both are a `RankState`, and `differences` names what is not equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vl.errors import ConfigError
from megatron_vl.plan.candidates import Candidate
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.overlap import bucket_elements
from megatron_vl.plan.search import Question
from megatron_vl.plan.stages import Stage, held_stages
from megatron_vl.plan.state_bytes import bytes_of_rank
from megatron_vl.plan.tensors import Weight, weights_of_chunk

Shape = tuple[int, ...]
Messages = tuple[tuple[Shape, int, int], ...]  # (shape, bytes of an element, how many), by shape
SAMPLE = re.compile(r"sample:([1-9]\d*)")


@dataclass(frozen=True)
class RankState:
    """weights: of each chunk, in the order in which they are registered. buffers: elements of tensors that modules hold
    beside their weights. weight_bytes, gradient_bytes, optimizer_bytes: as allocated, padding included, behind the
    first step. results: shapes of what each chunk of the pipeline gives. received, sent: tensors that come from and go
    to other stages in one step, and how many.
    """

    weights: tuple[tuple[Weight, ...], ...]
    buffers: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    results: tuple[Shape, ...]
    received: Messages
    sent: Messages

    @property
    def parameters(self) -> dict[str, int]:
        """Elements by part."""
        found = {"vision": 0, "projector": 0, "decoder": 0}
        for weight in (weight for chunk in self.weights for weight in chunk):
            found[weight.part] += weight.size
        return found


def plan_rank(question: Question, candidate: Candidate, rank: int) -> RankState:
    """The plan of a rank; one step has `dry_microbatches` micro-batches."""
    config, layout = question.config, candidate.layout
    model, coords, on_cpu = config.model, layout.coords(rank), question.device.on_cpu
    chunks = stages_of_rank(question, candidate, rank)
    parallel = config.parallel
    state = bytes_of_rank(
        model, layout, chunks, coords, question.element, parallel.use_distributed_optimizer,
        bucket_elements(parallel, layout.dp * layout.cp, on_cpu),
    )  # fmt: skip
    rows, local = candidate.micro_batch, config.data.seq_length // layout.cp
    hidden = (local // (layout.tp if layout.sp else 1), rows, model.text.hidden_size)
    pipeline = [stage for stage in chunks if not stage.beside]
    # what a stage gets from those before, it pays back with a gradient; and the other way behind it
    before = sum(not stage.has_embedding for stage in pipeline)
    behind = sum(not stage.has_head for stage in pipeline)
    count = dry_microbatches(layout, candidate.num_microbatches) * (before + behind)
    messages = ((hidden, question.element, count),) if count else ()
    return RankState(
        weights=tuple(weights_of_chunk(model, layout, stage) for stage in chunks),
        buffers=0,
        weight_bytes=state.weights,
        gradient_bytes=state.gradients,
        optimizer_bytes=state.optimizer,
        results=tuple((rows, local) if stage.has_head else hidden for stage in pipeline),
        received=messages,
        sent=messages,
    )


def stages_of_rank(question: Question, candidate: Candidate, rank: int) -> Sequence[Stage]:
    """The chunks of a rank, a tower beside the pipeline last."""
    num_layers = question.config.model.text.num_layers
    layout = candidate.layout
    return held_stages(num_layers, layout, candidate.layers)[layout.coords(rank).pp]


def dry_microbatches(layout: Layout, planned: int) -> int:
    """Micro-batches of the step of a dry run, of those planned, which are more of the same: enough for the pipeline to
    fill, run steadily and empty."""
    enough = 2 * layout.pp if layout.vpp > 1 else layout.pp  # interleaved: a multiple of PP
    return min(planned, enough)


def differences(planned: RankState, built: RankState) -> Iterator[str]:
    """Everything that is not as planned, in words."""
    if len(planned.weights) != len(built.weights):
        yield f"chunks: planned {len(planned.weights)}, built {len(built.weights)}"
    for number, (ours, theirs) in enumerate(zip(planned.weights, built.weights)):
        if ours != theirs:
            yield f"chunk {number}: {_first_difference(ours, theirs)}"
    for part, size in planned.parameters.items():
        if size != built.parameters[part]:
            yield f"parameters of the {part}: planned {size:,}, built {built.parameters[part]:,}"
    for name, unit in (
        ("buffers", "elements"), ("weight_bytes", "bytes"), ("gradient_bytes", "bytes"), ("optimizer_bytes", "bytes"),
    ):  # fmt: skip
        ours, theirs = getattr(planned, name), getattr(built, name)
        if ours != theirs:
            word = name.removesuffix("_bytes")
            yield f"{word}: planned {ours:,} {unit}, built {theirs:,} ({theirs - ours:+,})"
    for name in ("results", "received", "sent"):
        ours, theirs = getattr(planned, name), getattr(built, name)
        if ours != theirs:
            yield f"{name}: planned {ours}, built {theirs}"


def _first_difference(planned: Sequence[Weight], built: Sequence[Weight]) -> str:
    for ours, theirs in zip(planned, built):
        if ours != theirs:
            return (
                f"planned {ours.name} of {ours.size:,} elements, built {theirs.name} of {theirs.size:,} there"
            )
    return f"planned {len(planned)} weights, built {len(built)}"


def chosen_ranks(text: str, world_size: int) -> list[int]:
    """The ranks that `--rank` names: `17`, `0,511,1023`, or `sample:22` (first, last, and others evenly between, all of
    them where there are fewer; with as many as stages every stage has one). Raises ConfigError."""
    sample = SAMPLE.fullmatch(text)
    if sample:
        count = min(int(sample[1]), world_size)
        return [number * (world_size - 1) // max(count - 1, 1) for number in range(count)]
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(f"--rank {text}: not a rank; give e.g. 17, 0,511,1023 or sample:22")
    ranks = [int(part) for part in parts]
    outside = [rank for rank in ranks if rank >= world_size]
    if outside:
        raise ConfigError(f"--rank {text}: {world_size} ranks have numbers 0 to {world_size - 1}; see --gpus")
    return ranks
