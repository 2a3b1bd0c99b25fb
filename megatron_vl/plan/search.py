"""The planner: legal layouts by predicted step time, what fits, and why the others do not.

Times are cheap and memory is not, so layouts and their recomputation are taken in the order of their times. Of each
(TP, CP, PP) the first that fits is its best.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vl.config.schema import RecomputeConfig, RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.plan.candidates import Candidate, candidates, divisors
from megatron_vl.plan.closing import Closing, closing_of, closing_seconds
from megatron_vl.plan.cost import sample_flops, train_flops
from megatron_vl.plan.devices import GIB, Device
from megatron_vl.plan.kept import Load
from megatron_vl.plan.kernels import FP32, Kernels, kernels_of_run
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.memory import Setting, fixed_bytes, memory_of_stage, setting_of
from megatron_vl.plan.overlap import bucket_elements, overlap_of
from megatron_vl.plan.stages import Stage, balanced_layers, held_stages
from megatron_vl.plan.state_bytes import RankBytes, buckets_of_stage, bytes_of_stage
from megatron_vl.plan.step_time import Rates, StepTime, rates, step_parts, step_seconds
from megatron_vl.plan.vision_share import CROP, GLOBAL

WAVE = 8  # views of a step that are encoded, and computed again, together
IMAGE_CROPS = 6  # of an image of the plan, beside the global view
SHOWN = 12


@dataclass(frozen=True)
class Question:
    """What is to be laid out.

    visual_share: part of the tokens that are visual. document_tokens: length of the documents of packed rows, None =
    one per row.
    """

    config: RunConfig
    device: Device
    world_size: int
    visual_share: float = 0.0
    document_tokens: int | None = None

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        params = self.config.precision.params
        return 4 if params == "fp32" or (params == "auto" and self.device.on_cpu) else 2

    @property
    def kernels(self) -> Kernels:
        """What the run has on this device."""
        return kernels_of_run(self.config, self.element, self.device.on_cpu, self.device.capability)

    @property
    def images_per_row(self) -> int:
        """Images of a row, rounded; at least one where any share is asked for. Raises ConfigError when they are longer
        than the row."""
        vision, length = self.config.model.vision, self.config.data.seq_length
        tokens = IMAGE_CROPS * vision.crop_tokens + vision.global_tokens
        wanted = self.visual_share * length / tokens
        found = max(1, round(wanted)) if wanted > 0 else 0
        if found * tokens > length:
            raise ConfigError(
                f"data.seq_length = {length}: the plan's images are {found * tokens} tokens a row; raise it, or use "
                "--visual-share 0"
            )
        return found

    def load(self, rows: int) -> Load:
        """A micro-batch of so many rows."""
        length = self.config.data.seq_length
        documents: tuple[int, ...] = ()
        if self.config.data.packing.enabled:
            each = min(self.document_tokens or length, length)
            whole, rest = divmod(length, each)
            documents = (each,) * whole + ((rest,) if rest else ())
        images = self.images_per_row * rows
        return Load(rows, length, IMAGE_CROPS * images, images, documents)

    def model_flops(self) -> float:
        """Training FLOPs of a step without recomputation, which MFU counts."""
        load = self.load(1)
        kinds = [CROP] * load.crops + [GLOBAL] * load.globals
        forward = sample_flops(self.config.model, kinds, load.documents or (load.tokens,), load.tokens)
        return self.config.train.global_batch_size * sum(train_flops(self.config.model, forward).values())


@dataclass(frozen=True)
class Verdict:
    """What the plan says of a layout. memory: bytes by part of the stages that were looked at."""

    candidate: Candidate
    time: StepTime
    memory: Mapping[int, Mapping[str, int]]
    limit: int

    @property
    def fullest(self) -> int:
        """The stage with the most bytes."""
        return max(self.memory, key=lambda stage: sum(self.memory[stage].values()))

    @property
    def peak(self) -> int:
        """Bytes of the fullest stage."""
        return sum(self.memory[self.fullest].values())

    @property
    def fits(self) -> bool:
        """Whether every stage is within the device's memory."""
        return not self.limit or self.peak <= self.limit

    @property
    def reason(self) -> str:
        """Why it does not fit: the fullest stage and its two largest parts."""
        parts = self.memory[self.fullest]
        largest = sorted(parts, key=lambda part: -parts[part])[:2]
        told = ", ".join(f"{part} {parts[part] / GIB:.1f}" for part in largest)
        return f"pp{self.fullest} needs {self.peak / GIB:.1f} of {self.limit / GIB:.1f} GiB ({told})"


@dataclass(frozen=True)
class Answer:
    """best: of the fastest (TP, CP, PP) the fastest setting that fits, by time. unfit: (TP, CP, PP) of which no layout
    fits with any setting, each with its nearest. refused: (key, rule) of illegal layouts. looked_at: legal layouts.
    fitting: of how many (TP, CP, PP) something fits."""

    best: Sequence[Verdict]
    unfit: Sequence[Verdict]
    refused: Sequence[tuple[str, str]]
    looked_at: int
    fitting: int


class Planner:
    """A question with what its layouts have in common, remembered."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._rates: dict[tuple, Rates] = {}
        self.kernels = question.kernels
        self._closing: dict[tuple, Closing] = {}
        self._fixed: dict[tuple, RankBytes] = {}
        self._memory_settings: dict[tuple, Setting] = {}
        self._balanced: dict[int, list[int]] = {}
        self._stages: dict[tuple, list[list[Stage]]] = {}
        self._loads: dict[int, Load] = {}
        self._tower: RankBytes | None = None
        self._settings: dict[bool, list[RecomputeConfig]] = {}

    def settings(self, layout: Layout) -> list[RecomputeConfig]:
        """Recomputation to choose from, cheapest first; off-load is the run's, and so are chunks of views, but where a
        tower beside the pipeline would keep those of a whole step. Selective recomputation repeats the core attention
        and saves nothing worth it: no scores, no gathered K and V are kept."""
        if layout.tower_beside in self._settings:
            return self._settings[layout.tower_beside]
        asked = self.question.config.recompute
        base = RecomputeConfig(offload=asked.offload, vision_chunk_views=asked.vision_chunk_views)
        if not self.question.images_per_row:
            vision = [base]
        elif layout.tower_beside:
            vision = [base, replace(base, vision_chunk_views=asked.vision_chunk_views or WAVE)]
        else:
            vision = [base, replace(base, vision="full")]
        found = [replace(one, decoder=decoder) for decoder in ("none", "full") for one in vision]
        self._settings[layout.tower_beside] = found
        return found

    def time(self, candidate: Candidate) -> StepTime:
        """Predicted seconds of a step."""
        found, counts = self.rates(candidate), self.counts(candidate)
        closing = sum(self._closing_seconds(candidate, found, counts).values())
        return step_seconds(
            candidate.layout, self.question.device, found, counts, candidate.num_microbatches, closing
        )

    def parts(self, candidate: Candidate) -> dict[str, float]:
        """What the seconds are made of."""
        return step_parts(
            candidate.layout, self.rates(candidate), self.counts(candidate), candidate.num_microbatches,
            self.time(candidate), self.closing(candidate),
        )  # fmt: skip

    def rates(self, candidate: Candidate) -> Rates:
        """Seconds of the parts of a micro-batch."""
        question, layout, recompute = self.question, candidate.layout, candidate.recompute
        key = (
            layout.tp, layout.cp, layout.pp, layout.sp, layout.placement, candidate.micro_batch,
            recompute.decoder, recompute.vision, recompute.vision_chunk_views, recompute.offload,
        )  # fmt: skip
        if key not in self._rates:
            self._rates[key] = rates(
                question.config.model, layout, question.device, self.kernels,
                self._load(candidate.micro_batch), recompute, candidate.num_microbatches,
            )  # fmt: skip
        return self._rates[key]

    def _load(self, rows: int) -> Load:
        if rows not in self._loads:
            self._loads[rows] = self.question.load(rows)
        return self._loads[rows]

    def counts(self, candidate: Candidate) -> Sequence[int]:
        """Decoder layers of each chunk in pipeline order."""
        if candidate.layers is not None:
            return candidate.layers
        chunks = candidate.layout.num_chunks
        if chunks not in self._balanced:
            self._balanced[chunks] = balanced_layers(self.question.config.model.text.num_layers, chunks)
        return self._balanced[chunks]

    def closing(self, candidate: Candidate) -> dict[str, float]:
        """Seconds behind the last micro-batch that nothing hides, by part."""
        return self._closing_seconds(candidate, self.rates(candidate), self.counts(candidate))

    def _closing_seconds(self, candidate: Candidate, found: Rates, counts: Sequence[int]) -> dict[str, float]:
        layout, device, back = candidate.layout, self.question.device, found.layer.own - found.forward
        forward = [count * found.forward for count in counts[: layout.pp]]
        backward = [count * back for count in counts[: layout.pp]]
        overlap = overlap_of(self.question.config.parallel, layout.dp * layout.cp, device.on_cpu)
        return closing_seconds(self._closing_of(candidate), overlap, device.on_cpu, forward, backward)

    def _closing_of(self, candidate: Candidate) -> Closing:
        """What the layout has to communicate and to update there."""
        question, layout = self.question, candidate.layout
        key = (layout.tp, layout.pp, layout.vpp, layout.placement, candidate.layers)  # CP counts with DP
        if key in self._closing:
            return self._closing[key]
        parallel = question.config.parallel
        distributed = parallel.use_distributed_optimizer
        bucket = bucket_elements(parallel, layout.dp * layout.cp, question.device.on_cpu)
        model, element, tower = question.config.model, question.element, None
        stages = self.stages(candidate)
        if layout.tower_beside:
            stages, beside = [of_rank[:-1] for of_rank in stages], stages[0][-1:]
            if self._tower is None:  # every rank's, cut over all of them in every layout
                self._tower = bytes_of_stage(model, layout, beside, element, distributed)
            tower = self._tower
        state = {
            pp: (
                bytes_of_stage(model, layout, stages[pp], element, distributed, bucket),
                buckets_of_stage(model, layout, stages[pp], distributed, bucket),
            )
            for pp in can_be_fullest(stages)
        }
        found = closing_of(model, layout, question.device, state, element, distributed, tower)
        self._closing[key] = found
        return found

    def stages(self, candidate: Candidate) -> list[list[Stage]]:
        """What each pipeline rank of a layout holds."""
        layout, num_layers = candidate.layout, self.question.config.model.text.num_layers
        key = (layout.pp, layout.vpp, layout.tower_beside, candidate.layers)
        if key not in self._stages:
            self._stages[key] = held_stages(num_layers, layout, candidate.layers)
        return self._stages[key]

    def judge(self, candidate: Candidate, every_stage: bool = True) -> Verdict:
        """Time and memory of a layout. every_stage: else only those stages that can be the fullest."""
        stages = self.stages(candidate)
        memory = self._memory(candidate, range(len(stages)) if every_stage else can_be_fullest(stages))
        return Verdict(candidate, self.time(candidate), memory, self.question.device.memory)

    def fits(self, candidate: Candidate) -> bool:
        """Whether every stage is within the device's memory."""
        limit = self.question.device.memory
        return not limit or self.peaks(candidate)[0] <= limit

    def peaks(self, candidate: Candidate) -> tuple[int, int]:
        """Bytes of the fullest stage, and how few there may be with less recomputation.

        That keeps more; what it can spare is room to work in, and the rotary angles of a whole row, which recomputed
        layers keep.
        """
        load, text = self._load(candidate.micro_batch), self.question.config.model.text
        angles = max(load.documents, default=load.tokens) * text.kv_channels * FP32
        memory = self._memory(candidate, can_be_fullest(self.stages(candidate)))
        found = [(sum(parts.values()), parts["workspace"]) for parts in memory.values()]
        return max(peak for peak, _ in found), max(peak - passing for peak, passing in found) - angles

    def _memory(self, candidate: Candidate, wanted: Iterable[int]) -> dict[int, dict[str, int]]:
        """Bytes by part of those stages."""
        layout, stages, setting = candidate.layout, self.stages(candidate), self._setting(candidate)
        return {
            pp: memory_of_stage(setting, layout, stages[pp], self._fixed_bytes(setting, candidate, pp))
            for pp in wanted
        }

    def _setting(self, candidate: Candidate) -> Setting:
        """What the layout's memory depends on."""
        question, layout, device = self.question, candidate.layout, self.question.device
        key = (layout.dp, layout.cp, candidate.micro_batch, candidate.recompute)
        if key not in self._memory_settings:
            self._memory_settings[key] = setting_of(
                candidate.run(question.config), layout, self._load(candidate.micro_batch), question.element,
                device.on_cpu, device.reserve, device.capability,
            )  # fmt: skip
        found = self._memory_settings[key]
        return replace(found, waiting=self.rates(candidate).waiting) if candidate.recompute.offload else found

    def _fixed_bytes(self, setting: Setting, candidate: Candidate, pp: int) -> RankBytes:
        """What a stage holds whatever its micro-batches are."""
        layout = candidate.layout
        key = (layout.tp, layout.pp, layout.vpp, layout.placement, candidate.layers, pp)
        if key not in self._fixed:
            self._fixed[key] = fixed_bytes(setting, layout, self.stages(candidate)[pp])
        return self._fixed[key]

    def answer(self, shown: int = SHOWN) -> Answer:
        """Looks at every legal layout: the ``shown`` fastest (TP, CP, PP), and which others have nothing that fits."""
        refused, legal = [], []
        for found in self._candidates():
            (refused if isinstance(found, tuple) else legal).append(found)
        best, unfit, fitting = Ranking(self).ranked(legal, shown)
        return Answer(best, unfit, refused, len(legal), fitting)

    def least_seconds(self, candidate: Candidate) -> float:
        """No recomputation of the layout takes less: none does, or with off-loading, where it spares copies, the
        decoder's."""
        settings = self.settings(candidate.layout)
        quickest = settings[:: len(settings) // 2] if settings[0].offload else settings[:1]
        return min(self.time(candidate.with_recompute(one)).total for one in quickest)

    def _candidates(self) -> Iterator[Candidate | tuple[str, str]]:
        config, device, world = self.question.config, self.question.device, self.question.world_size
        return candidates(config, world, min(device.node_ranks, world), self.relief())

    def relief(self) -> dict[tuple[int, int, int, str], float]:
        """Decoder layers that the tower costs, by (tp, cp, pp, placement)."""
        question, found = self.question, {}
        if not question.images_per_row:
            return found
        limit = min(question.device.node_ranks, question.world_size)
        for tp in divisors(question.world_size, limit):
            for cp in divisors(question.world_size // tp, question.config.data.seq_length):
                for placement in ("data", "tensor") if tp > 1 else ("data",):
                    layout = Layout(tp, cp, question.world_size // tp // cp, 1, 1, tp > 1, placement)
                    try:
                        one = rates(
                            question.config.model, layout, question.device, self.kernels, question.load(1),
                            RecomputeConfig(),
                        )  # fmt: skip
                    except ZeroDivisionError:
                        continue
                    for pp in divisors(
                        question.world_size // tp // cp, question.config.model.text.num_layers + 2
                    ):
                        found[tp, cp, pp, placement] = one.tower.total / one.layer.total
        return found


Entry = tuple[
    float, int, int, Candidate
]  # seconds, numbers of the layout and of its setting, for equal seconds


class Ranking:
    """A search in the order of step times.

    A layout waits with the least that any of its settings takes; when its turn comes, each of its settings waits with
    its own time, so that what comes first and fits is the fastest.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._nearest: dict[tuple, tuple[int, Candidate]] = {}
        self._hopeless: dict[tuple, int] = {}
        self._fitting: set[tuple] = set()

    def ranked(
        self, legal: Sequence[Candidate], shown: int
    ) -> tuple[Sequence[Verdict], Sequence[Verdict], int]:
        """As in `Answer`: best, unfit, fitting."""
        best = self._fastest(legal, shown)
        for candidate in sorted(legal, key=lambda one: one.micro_batch):
            if sizes_of(candidate) not in self._fitting:
                self._can_fit(candidate)
        unfit = [one for sizes, (_, one) in self._nearest.items() if sizes not in self._fitting]
        return best, [self.planner.judge(one) for one in unfit], len(self._fitting)

    def _fastest(self, legal: Sequence[Candidate], shown: int) -> list[Verdict]:
        planner, best = self.planner, {}
        queue: list[Entry] = [
            (planner.least_seconds(one), number, -1, one) for number, one in enumerate(legal)
        ]
        heapq.heapify(queue)
        while queue and len(best) < shown:
            seconds, number, level, candidate = heapq.heappop(queue)
            sizes = sizes_of(candidate)
            if sizes in best:
                continue
            if level >= 0:
                if planner.fits(candidate):
                    best[sizes] = planner.judge(candidate)
                continue
            settings = planner.settings(candidate.layout) if self._can_fit(candidate) else ()
            for level, recompute in enumerate(settings):
                one = candidate.with_recompute(recompute)
                its_seconds = planner.time(one).total
                if its_seconds > seconds:
                    heapq.heappush(queue, (its_seconds, number, level, one))
                elif planner.fits(one):  # its turn is now
                    best[sizes] = planner.judge(one)
                    break
        return list(best.values())

    def _can_fit(self, candidate: Candidate) -> bool:
        """Whether the layout fits with any setting. Of what does not, the nearest to fitting is kept."""
        layout, sizes, rows = candidate.layout, sizes_of(candidate), candidate.micro_batch
        limit = self.planner.question.device.memory
        # more rows of a micro-batch never take less memory
        kind = (sizes, layout.vpp, layout.sp, layout.placement, candidate.layers)
        if self._hopeless.get(kind, rows + 1) <= rows:
            return False
        *less, most = self.planner.settings(layout)
        for recompute in (most, *reversed(less)):
            one = candidate.with_recompute(recompute)
            peak, at_least = self.planner.peaks(one)
            if not limit or peak <= limit:
                self._fitting.add(sizes)
                return True
            if sizes not in self._nearest or peak < self._nearest[sizes][0]:
                self._nearest[sizes] = peak, one
            if recompute == most and at_least > limit:
                break
        self._hopeless[kind] = rows
        return False


def sizes_of(candidate: Candidate) -> tuple[int, int, int]:
    """(TP, CP, PP)."""
    return candidate.layout.tp, candidate.layout.cp, candidate.layout.pp


def can_be_fullest(stages: Sequence[Sequence[Stage]]) -> list[int]:
    """Stages with everything that others of the same layers have, and more in flight: the first, the last, and of
    those between the first one with the most layers."""
    last = len(stages) - 1
    middle = sorted(range(1, last), key=lambda pp: (-sum(len(chunk.layers) for chunk in stages[pp]), pp))[:1]
    ahead = [1] if last > 1 and middle != [1] else []
    return sorted({0, last, *middle, *ahead})
