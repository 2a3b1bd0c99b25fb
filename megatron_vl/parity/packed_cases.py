"""Packed rows against their documents one by one: the rows that a packed, shared-out run is most likely to get wrong.

Each case is one packed row. Its loss and every gradient must be those of the same documents as dense rows on ONE rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig, PrecisionConfig, RecomputeConfig, RunConfig, TrainConfig
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.world import LocalWorld
from megatron_vl.parity.compare import Assembled, relative
from megatron_vl.parity.layouts import NamedLayout, parse_layout
from megatron_vl.parity.on_rank import Job, Seen, run
from megatron_vl.parity.reference import Document, arrange
from megatron_vl.plan.checks import check_layout
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.vision_share import CROP, GLOBAL

TOLERANCE = 1e-5
CHUNKS = 16  # of a document at 8 context-parallel ranks
NOT_SCORED = -100


@dataclass(frozen=True)
class _Builder:
    """Documents of random text and pixels for a model."""

    model: ModelConfig
    random: np.random.Generator

    @property
    def image(self) -> int:
        """Feature rows of the image that ``document`` puts in: one crop, one global view."""
        return self.model.vision.crop_tokens + self.model.vision.global_tokens

    def document(
        self, number: int, length: int, images_at: tuple[int, ...] = (), scored_from: int = 0
    ) -> Document:
        """length: tokens, images included. images_at: position of the first feature row of each. scored_from: only
        positions from there on may have a target; none has one before a feature row."""
        patch = self.model.tokens.im_patch
        words = np.setdiff1d(np.arange(min(self.model.text.vocab_size, 4096)), [patch])
        ids = self.random.choice(words, length).astype(np.int64)
        for start in images_at:
            assert start + self.image <= length, "the document has no room for its images"
            ids[start : start + self.image] = patch
        targets = np.append(ids[1:], NOT_SCORED)
        targets[targets == patch] = NOT_SCORED
        targets[:scored_from] = NOT_SCORED
        kinds = [CROP, GLOBAL] * len(images_at)
        sides = {CROP: self.model.vision.crop_size, GLOBAL: self.model.vision.image_size}
        pixels = [
            torch.from_numpy(self.random.standard_normal((3, sides[k], sides[k]), dtype=np.float32))
            for k in kinds
        ]
        return Document(number, ids, targets, kinds, pixels)


def _text_only(make: _Builder) -> list[Document]:
    return [make.document(number, length) for number, length in enumerate((CHUNKS * 3, CHUNKS, 21))]


def _odd_lengths(make: _Builder) -> list[Document]:
    """Padding behind every document, whatever the layout's multiple."""
    lengths = (3, 17, make.image // 2 * 2 + 2 * CHUNKS + 1, 2, CHUNKS - 1)
    return [make.document(n, length, (5,) if n == 2 else ()) for n, length in enumerate(lengths)]


def _spanning(make: _Builder) -> list[Document]:
    """One document over all ranks, with images at its beginning, across its middle and at its end; and a short one."""
    length = CHUNKS * make.image
    long = make.document(0, length, (1, length // 2 - make.image // 2, length - make.image - 3))
    return [long, make.document(1, 7)]


def _images_on_one_rank(make: _Builder) -> list[Document]:
    """All feature rows lie in the first chunk of their documents, which the first rank holds."""
    return [make.document(n, CHUNKS * make.image, (0,)) for n in range(2)]


def _masked_rank(make: _Builder) -> list[Document]:
    """All scored positions lie in the last chunk, which the first rank holds too; the second document has none."""
    length = CHUNKS * make.image
    return [
        make.document(0, length, (2 * make.image,), scored_from=length - make.image),
        make.document(1, length, (CHUNKS,), scored_from=length),
    ]


CASES: dict[str, Callable[[_Builder], list[Document]]] = {
    "text_only": _text_only,
    "odd_lengths": _odd_lengths,
    "spanning": _spanning,
    "images_on_one_rank": _images_on_one_rank,
    "masked_rank": _masked_rank,
}


def named_cases(names: str) -> list[str]:
    """``all``, or names separated by commas. Raises ConfigError for a name that is none."""
    chosen = list(CASES) if names == "all" else [name for name in names.split(",") if name]
    for name in chosen:
        if name not in CASES:
            raise ConfigError(f"--packed-cases: {name!r} is no case; known are {', '.join(CASES)}")
    return chosen


def case_documents(name: str, model: ModelConfig) -> list[Document]:
    """The documents of a case, the same in every layout."""
    return CASES[name](_Builder(model, np.random.default_rng(sorted(CASES).index(name))))


@dataclass
class PackedRow:
    """One line of the table; distances are relative. loss: of the sum over the scored tokens."""

    layout: str
    placement: str
    case: str
    status: str
    rule: str = ""
    loss: float | None = None
    worst_grad: float | None = None
    worst_name: str = ""


@dataclass
class PackedCheck:
    """The model that the cases run with. Results on one rank are kept."""

    directory: str
    model: ModelConfig
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    placement: str = "data"
    device: str = "cpu"
    tolerance: float = TOLERANCE
    single: dict[str, tuple[float, dict[str, torch.Tensor]]] = field(default_factory=dict)

    def rows(self, world: LocalWorld, layouts: list[str], cases: list[str]) -> Iterator[PackedRow]:
        """Every case in every layout."""
        for layout in layouts:
            for case in cases:
                yield self.row(world, layout, case)

    def row(self, world: LocalWorld, layout: str, case: str) -> PackedRow:
        """One packed row in one layout, against its documents on one rank."""
        named = parse_layout(layout, self.placement, self.device)
        docs = case_documents(case, self.model)
        rule = self.refusal(named, docs)
        if rule:
            return PackedRow(layout, self.placement, case, "refused", rule)
        if case not in self.single:
            alone = parse_layout("1", "data", self.device)
            self.single[case] = self._result(world, alone, docs, packed=False, recompute=RecomputeConfig())
        loss, gradients = self.single[case]
        found, ours = self._result(world, named, docs, packed=True, recompute=self.recompute)
        far = {name: relative(ours[name], value) for name, value in gradients.items() if name in ours}
        far |= dict.fromkeys(gradients.keys() ^ ours.keys(), float("inf"))
        worst = max(far, key=far.__getitem__)
        row = PackedRow(
            layout, self.placement, case, "ok", "", abs(found - loss) / abs(loss), far[worst], worst
        )
        if not (row.loss <= self.tolerance and row.worst_grad <= self.tolerance):
            row.status = "failed"
        return row

    def refusal(self, named: NamedLayout, docs: list[Document]) -> str:
        """The rule that forbids the layout for this model, empty when none does."""
        layout = Layout.from_config(named.parallel, named.world_size)
        batches = arrange(docs, layout, True, len(docs))
        train = TrainConfig(micro_batch_size=1, global_batch_size=layout.dp * len(batches.rows[0]))
        data = DataConfig(seq_length=batches.seq_length)
        problems = check_layout(self.model, named.parallel, train, data, named.world_size)
        return "; ".join(str(problem) for problem in problems)

    def _result(
        self,
        world: LocalWorld,
        named: NamedLayout,
        docs: list[Document],
        packed: bool,
        recompute: RecomputeConfig,
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """Sum of the losses, and the gradients under released names."""
        layout = Layout.from_config(named.parallel, named.world_size)
        batches = arrange(docs, layout, packed, len(docs))
        config = RunConfig(
            model=self.model,
            parallel=named.parallel,
            recompute=recompute,
            precision=PrecisionConfig(params="fp32"),
            data=DataConfig(seq_length=batches.seq_length),
        )
        seen: list[Seen] = world.run(layout.world_size, run, Job(config, self.directory, batches))
        gradients = Assembled(seen, layout, batches, docs, self.model).gradients()
        return seen[0].losses[0] * seen[0].tokens, gradients
