"""Which decoder layers live on which pipeline stage, and who holds the tower, the embedding and the head.

Chunk k of the pipeline (0 .. pp * vpp - 1) lives on rank k mod pp as its virtual stage k div pp, as in
Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.errors import ConfigErrors, Problem
from megatron_vl.plan.layout import Layout

LAYERS_KEY = "parallel.pipeline_decoder_layers"


@dataclass(frozen=True)
class Stage:
    """One model chunk. layers: global indices of its decoder layers, possibly none. vp_stage: -1 for a tower beside."""

    pp_rank: int
    vp_stage: int
    layers: tuple[int, ...]
    has_vision: bool
    has_embedding: bool
    has_head: bool

    @property
    def beside(self) -> bool:
        """Whether it is the tower beside the stages of a pipeline rank."""
        return self.vp_stage < 0

    def __str__(self) -> str:
        if self.beside:
            return "tower"
        layers = (
            f"layers {self.layers[0]}-{self.layers[-1]} ({len(self.layers)})" if self.layers else "no layers"
        )
        marks = [
            name
            for name, here in (
                ("tower", self.has_vision),
                ("embedding", self.has_embedding),
                ("head", self.has_head),
            )
            if here
        ]
        return f"{layers}{' + ' if marks else ''}{' + '.join(marks)}"


def plan_stages(
    num_layers: int,
    pp: int,
    vpp: int = 1,
    explicit: Sequence[int] | None = None,
    tower_beside: bool = False,
) -> list[list[Stage]]:
    """The stages as `[pp_rank][vp_stage]`.

    explicit: layers of each chunk in pipeline order; None balances them. tower_beside: no stage has the tower, which
    every rank holds beside its stages (`tower_of_rank`). Raises ConfigErrors when it cannot be done.
    """
    problems = check_stages(num_layers, pp, vpp, explicit)
    if problems:
        raise ConfigErrors(problems)
    counts = list(explicit) if explicit is not None else balanced_layers(num_layers, pp * vpp)
    stages: list[list[Stage]] = [[] for _ in range(pp)]
    first_layer, last_chunk = 0, pp * vpp - 1
    for chunk, count in enumerate(counts):
        stages[chunk % pp].append(
            Stage(
                pp_rank=chunk % pp,
                vp_stage=chunk // pp,
                layers=tuple(range(first_layer, first_layer + count)),
                has_vision=chunk == 0 and not tower_beside,
                has_embedding=chunk == 0,
                has_head=chunk == last_chunk,
            )
        )
        first_layer += count
    return stages


def held_stages(num_layers: int, layout: Layout, explicit: Sequence[int] | None = None) -> list[list[Stage]]:
    """Everything that each pipeline rank holds: its stages, and in placement `all` the tower behind them."""
    stages = plan_stages(num_layers, layout.pp, layout.vpp, explicit, layout.tower_beside)
    if not layout.tower_beside:
        return stages
    return [[*of_rank, tower_of_rank(pp_rank)] for pp_rank, of_rank in enumerate(stages)]


def tower_of_rank(pp_rank: int) -> Stage:
    """The tower and projector that a pipeline rank holds beside its stages, in placement `all`."""
    return Stage(pp_rank, vp_stage=-1, layers=(), has_vision=True, has_embedding=False, has_head=False)


def balanced_layers(num_layers: int, chunks: int) -> list[int]:
    """Layers of each chunk, differing by at most one.

    Spare layers go to the middle chunks, from the back, then to the last and only then to the first, because
    the first chunk carries the tower and the last one the head.
    """
    base, spare = divmod(num_layers, chunks)
    order = [*range(chunks - 2, 0, -1), chunks - 1, 0]
    larger = set(order[:spare])
    return [base + (chunk in larger) for chunk in range(chunks)]


def check_stages(num_layers: int, pp: int, vpp: int, explicit: Sequence[int] | None) -> list[Problem]:
    """What makes the stages impossible. Only the first and the last chunk may be without layers."""
    chunks = pp * vpp
    split = f"pipeline_model_parallel_size {pp}" + (f" x virtual size {vpp}" if vpp > 1 else "")
    if explicit is None:
        if num_layers >= chunks - 2:
            return []
        return [
            Problem(
                "model.text.num_layers",
                num_layers,
                f"too few layers for the {chunks} stages of {split}: only the first and the last stage "
                f"may go without",
                f"use at most {num_layers + 2} stages",
            )
        ]
    counts = list(explicit)
    problems = []
    if len(counts) != chunks:
        problems.append(
            Problem(
                LAYERS_KEY,
                counts,
                f"needs one number for each of the {chunks} stages of {split}",
                f"give {chunks} numbers, in pipeline order, or remove the key",
            )
        )
    if sum(counts) != num_layers:
        problems.append(
            Problem(
                LAYERS_KEY,
                counts,
                f"sums to {sum(counts)}, but the decoder has {num_layers} layers",
                f"make the sum {num_layers}",
            )
        )
    if any(count < 0 for count in counts):
        problems.append(
            Problem(LAYERS_KEY, counts, "a stage cannot hold fewer than 0 layers", "use 0 or more")
        )
    if any(count == 0 for count in counts[1:-1]):
        problems.append(
            Problem(
                LAYERS_KEY,
                counts,
                "a stage in the middle would hold nothing",
                "put 0 only first (tower and embedding) or last (head)",
            )
        )
    return problems


def to_megatron_layout(stages: list[list[Stage]]) -> list[list[str]]:
    """What Megatron-Core's `PipelineParallelLayerLayout` takes: one list per chunk, in pipeline order."""
    in_order = [stages[pp_rank][vp] for vp in range(len(stages[0])) for pp_rank in range(len(stages))]
    return [
        ["embedding"] * stage.has_embedding + ["decoder"] * len(stage.layers) + ["loss"] * stage.has_head
        for stage in in_order
    ]
