"""What a data plan is made from: its settings, and each domain with what the rows refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vl.config.mixture import DomainConfig, MixturePhase, PackingConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.lengths import LengthIndex, digest_of
from megatron_vl.data.packing import PackRule
from megatron_vl.data.streams import DomainStream
from megatron_vl.plan.row_work import WorkRates

PLAN_FORMAT = 1  # to be raised when the same settings give other rows
TOO_LONG, TOO_MANY_VIEWS = "too_long", "too_many_views"


@dataclass(frozen=True)
class PlanSettings:
    """Everything beside the lengths that decides the plan.

    pack: None = dense, one document per row. pad_multiple: tokens per unit of `pack`. max_globals, max_crops:
    of a row. phases: at least one.
    """

    seq_length: int
    global_batch_size: int
    seed: int
    rates: WorkRates
    domains: tuple[DomainConfig, ...]
    phases: tuple[MixturePhase, ...]
    packed: bool = True
    pad_multiple: int = 32
    look_ahead_rows: int = 128
    max_globals: int | None = None
    max_crops: int | None = None
    balance: bool = True

    def __post_init__(self) -> None:
        longest = self.rates.document(self.seq_length, 0, 0)
        assert longest < 1 << 62, f"a document of {self.seq_length} tokens: its FLOPs do not fit an int64"

    @classmethod
    def of(
        cls,
        data: DataConfig,
        packing: PackingConfig,
        domains: Sequence[DomainConfig],
        phases: Sequence[MixturePhase],
        model: ModelConfig,
        global_batch_size: int,
    ) -> PlanSettings:
        """From the sections of a run. No phase = one without an end. domains: `training_domains`."""
        return cls(
            seq_length=data.seq_length,
            global_batch_size=global_batch_size,
            seed=data.seed,
            rates=WorkRates.of(model),
            domains=tuple(domains),
            phases=tuple(phases) or (MixturePhase(),),
            packed=packing.enabled,
            pad_multiple=packing.pad_multiple if packing.enabled else 1,
            look_ahead_rows=packing.look_ahead_rows,
            max_globals=packing.max_global_views,
            max_crops=packing.max_crops,
            balance=packing.balance,
        )

    @property
    def rule(self) -> PackRule:
        """The rule for one row."""
        return PackRule(self.seq_length // self.pad_multiple, self.max_globals, self.max_crops, self.balance)

    @property
    def window_tokens(self) -> int:
        """Length of a window in tokens of all domains."""
        return self.look_ahead_rows * self.seq_length

    def units(self, tokens: np.ndarray) -> np.ndarray:
        """Padded lengths in units."""
        return -(-tokens // self.pad_multiple)

    def digest(self, indices: Sequence[LengthIndex]) -> str:
        """What decides the rows of every step, as a hash. The length of the last phase is not part of it.

        So a finished run may be made longer: the steps that it has done stay the same.
        """
        phases = [
            [None if number == len(self.phases) - 1 else phase.tokens, phase.text_share]
            + [[share.name, share.weight, share.epochs] for share in phase.domains]
            for number, phase in enumerate(self.phases)
        ]
        domains = [[d.name, d.modality, d.weight, d.epochs] for d in self.domains]
        packing = (
            [self.pad_multiple, self.look_ahead_rows, self.max_globals, self.max_crops, self.balance]
            if self.packed
            else [self.look_ahead_rows]
        )
        rates = self.rates
        work = [rates.per_global, rates.per_crop, rates.per_token, rates.per_token_squared]
        sizes = [PLAN_FORMAT, self.seq_length, self.global_batch_size, self.seed]
        return digest_of([sizes, packing, work, domains, phases, [index.digest for index in indices]])


def training_domains(train: Sequence[str], domains: Sequence[DomainConfig]) -> tuple[DomainConfig, ...]:
    """The domains of a run; without any, the files of data.train are the only one."""
    return tuple(domains) or (DomainConfig("train", list(train), format="jsonl", weight=1.0),)


@dataclass
class Domain:
    """A domain's index with what the rows refuse as well, and its stream. None = no token asked of it.

    tokens: int32 [n], 0 where refused. too_long, too_many_views: bool [n].
    """

    index: LengthIndex
    settings: PlanSettings
    tokens: np.ndarray
    too_long: np.ndarray
    too_many_views: np.ndarray
    stream: DomainStream | None

    @classmethod
    def of(cls, index: LengthIndex, settings: PlanSettings, used: bool) -> Domain:
        """Applies the limits of a row to the lengths. Raises DataError when nothing of a used one is left."""
        tokens = np.asarray(index.tokens)
        too_long = tokens > settings.seq_length
        too_many_views = np.zeros(len(tokens), dtype=bool)
        for views, limit in ((index.globals_, settings.max_globals), (index.crops, settings.max_crops)):
            if settings.packed and limit is not None:
                too_many_views |= views > limit
        tokens = np.where(too_long | too_many_views, 0, tokens).astype(np.int32)
        stream = DomainStream(index.name, tokens, settings.seed) if used else None
        return cls(index, settings, tokens, too_long, too_many_views, stream)

    def reason(self, index: int) -> str:
        """Why a sample is refused, by the index or by the limits of a row; "" = it is not."""
        if self.too_long[index]:
            return TOO_LONG
        return TOO_MANY_VIEWS if self.too_many_views[index] else self.index.reason(index)

    def refused(self) -> dict[str, int]:
        """Refused samples of one epoch by reason."""
        counts = self.index.refused()
        counts[TOO_LONG] = int(self.too_long.sum())
        counts[TOO_MANY_VIEWS] = int((self.too_many_views & ~self.too_long).sum())
        return {reason: count for reason, count in counts.items() if count}

    def __reduce__(self):
        return Domain.of, (self.index, self.settings, self.stream is not None)
