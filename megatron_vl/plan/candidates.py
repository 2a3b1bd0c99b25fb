"""Which layouts there are to choose from, which of them the run may have, and why not the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vl.config.schema import ParallelConfig, RecomputeConfig, RunConfig, TrainConfig
from megatron_vl.plan.attention_checks import check_attention
from megatron_vl.plan.checks import check_layout
from megatron_vl.plan.fp8 import check_fp8
from megatron_vl.plan.kernel_checks import check_kernels
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.mixture_checks import check_packing
from megatron_vl.plan.recompute_checks import check_recompute
from megatron_vl.plan.stages import balanced_layers

MICRO_BATCHES = (1, 2, 4, 8)
VIRTUAL = (1, 2, 3, 4, 6, 9)
SHORTEST_SLICE = 1024  # tokens of a row that a context-parallel rank should at least have
SMALL_SLICE = 8  # the same where rows are short anyway


@dataclass(frozen=True)
class Candidate:
    """One layout with what else decides speed and memory. layers: of each chunk when not balanced."""

    layout: Layout
    layers: tuple[int, ...] | None
    micro_batch: int
    num_microbatches: int
    recompute: RecomputeConfig

    def with_recompute(self, recompute: RecomputeConfig) -> Candidate:
        """The same layout with another setting; faster than `replace`, of which a search makes ten thousands."""
        return Candidate(self.layout, self.layers, self.micro_batch, self.num_microbatches, recompute)

    def parallel(self, base: ParallelConfig) -> ParallelConfig:
        """The configuration of this layout."""
        return replace(
            base,
            tensor_model_parallel_size=self.layout.tp,
            pipeline_model_parallel_size=self.layout.pp,
            virtual_pipeline_model_parallel_size=self.layout.vpp if self.layout.vpp > 1 else None,
            context_parallel_size=self.layout.cp,
            sequence_parallel=self.layout.sp,
            vision_placement=self.layout.placement,
            pipeline_decoder_layers=None if self.layers is None else list(self.layers),
        )

    def run(self, base: RunConfig) -> RunConfig:
        """The whole run in this layout."""
        return replace(
            base,
            parallel=self.parallel(base.parallel),
            train=replace(base.train, micro_batch_size=self.micro_batch),
            recompute=self.recompute,
        )


def candidates(
    config: RunConfig, world_size: int, node_ranks: int, relieved: dict[tuple[int, int, int, str], float]
) -> Iterator[Candidate | tuple[str, str]]:
    """Every legal layout of `world_size` ranks, without recomputation; (key, rule) for each refused one.

    node_ranks: tensor parallelism stays inside a node. relieved: by (tp, cp, pp, placement), how many decoder layers
    the tower costs; the first stage then also comes with that many layers fewer than its balanced share. Empty: there
    are no images, and placement `all` would gain nothing.
    """
    seq_length, num_layers = config.data.seq_length, config.model.text.num_layers
    slice_limit = max(1, seq_length // (SHORTEST_SLICE if seq_length >= 2 * SHORTEST_SLICE else SMALL_SLICE))
    # of each size one description, not one for each layout: there are ten thousands
    trains = {size: replace(config.train, micro_batch_size=size) for size in MICRO_BATCHES}
    for tp in divisors(world_size, node_ranks):
        for cp in divisors(world_size // tp, slice_limit):
            for pp in divisors(world_size // tp // cp, num_layers + 2):
                yield from _of_sizes(config, world_size, (tp, cp, pp), relieved, trains)


def _of_sizes(
    config, world_size: int, sizes: tuple[int, int, int], relieved, trains
) -> Iterator[Candidate | tuple[str, str]]:
    """Candidates of one (tp, cp, pp)."""
    tp, cp, pp = sizes
    dp, num_layers = world_size // tp // cp // pp, config.model.text.num_layers
    for vpp in VIRTUAL if pp > 1 else (1,):
        if vpp > 1 and num_layers < pp * vpp:
            continue
        for sp in (True, False) if tp > 1 else (False,):
            for placement in ("data",) + ("tensor",) * (tp > 1) + ("all",) * (pp > 1 and bool(relieved)):
                layout = Layout(tp, cp, dp, pp, vpp, sp, placement)
                for layers in _splits(num_layers, pp, vpp, relieved.get((tp, cp, pp, placement), 0.0)):
                    yield from _of_layout(config, layout, layers, trains)


def _of_layout(
    config: RunConfig, layout: Layout, layers: tuple[int, ...] | None, trains: Mapping[int, TrainConfig]
) -> Iterator[Candidate | tuple[str, str]]:
    """Candidates of one layout: its micro-batch sizes."""
    base = Candidate(layout, layers, 1, 1, RecomputeConfig())
    parallel = base.parallel(config.parallel)
    sizes = MICRO_BATCHES if not config.data.packing.enabled else (1,)
    for size in sizes:
        rest, odd = divmod(config.train.global_batch_size, size * layout.dp)
        if size > 1 and (odd or (layout.vpp > 1 and rest % layout.pp)):
            continue
        problems = refusals(config, parallel, trains[size], base.recompute, layout.world_size)
        if problems:
            yield problems[0]
            return
        yield Candidate(layout, layers, size, rest, base.recompute)


def refusals(
    config: RunConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    recompute: RecomputeConfig,
    world_size: int,
) -> list[tuple[str, str]]:
    """(key, rule) of everything that forbids the layout; the same checks as those of a run."""
    problems = [
        *check_layout(config.model, parallel, train, config.data, world_size),
        *check_recompute(config.model, parallel, recompute),
        *check_packing(config.data.packing, parallel, config.data.seq_length, train.micro_batch_size),
        *check_attention(config.model.text, parallel, config.data.packing),
        *check_kernels(config.model.vision, parallel),
    ]
    if config.precision.fp8 != "none":
        problems += check_fp8(replace(config, parallel=parallel, train=train))
    return [(problem.path, problem.rule) for problem in problems]


def _splits(num_layers: int, pp: int, vpp: int, tower_layers: float) -> Iterator[tuple[int, ...] | None]:
    """None (the balanced split), and one whose first chunk has fewer layers since it carries the tower."""
    yield None
    chunks = pp * vpp
    if pp == 1 or tower_layers < 0.5:
        return
    first = max(0, round((num_layers + tower_layers) / chunks - tower_layers))
    if chunks - 1 > num_layers - first:
        return
    rest = balanced_layers(num_layers - first, chunks - 1)[::-1]  # spare layers to the front of the rest
    layers = (first, *rest)
    if layers != tuple(balanced_layers(num_layers, chunks)) and min(layers[1:]) > 0:
        yield layers


def divisors(number: int, limit: int) -> list[int]:
    """Divisors of a number up to a limit."""
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def grouped(refused: Sequence[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """(how many, key, an example of the rule), most frequent first; rules of one key count together."""
    counts = Counter(key for key, _ in refused)
    example = dict(reversed(refused))
    return [(count, key, example[key]) for key, count in counts.most_common()]
