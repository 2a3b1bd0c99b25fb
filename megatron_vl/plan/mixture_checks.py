"""Rules between the keys of mixture and packing. Each function returns ALL problems and raises nothing."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_vl.config.mixture import DomainConfig, MixturePhase, PackingConfig
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import Problem
from megatron_vl.plan.mixture import Ask, asks_of, in_epochs
from megatron_vl.plan.sequence import row_multiple


def check_mixture(domains: Sequence[DomainConfig], phases: Sequence[MixturePhase]) -> list[Problem]:
    """Everything that makes the mixture impossible whatever its data. No phase = one without an end."""
    problems = [*_domains(domains)]
    for number, phase in enumerate(phases or [MixturePhase()]):
        where = f"data.mixture[{number}]" if phases else "data.domains"
        problems += _names(where, domains, phase)
        problems += _amounts(where, domains, phase)
        if phases:
            problems += _length(where, domains, phase, last=number == len(phases) - 1)
    return problems


def check_packing(
    packing: PackingConfig, parallel: ParallelConfig, seq_length: int, micro_batch_size: int
) -> list[Problem]:
    """Everything that makes packing impossible in a layout."""
    if not packing.enabled:
        return [*_overlong_needs(packing)]
    problems = []
    needed = row_multiple(
        parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.sequence_parallel
    )
    if packing.pad_multiple % needed:
        problems.append(
            Problem(
                "data.packing.pad_multiple",
                packing.pad_multiple,
                f"must be a multiple of {needed}, which 2 x context_parallel_size "
                f"{parallel.context_parallel_size} and sequence parallelism over "
                f"tensor_model_parallel_size {parallel.tensor_model_parallel_size} ask of every document",
                f"choose {-(-packing.pad_multiple // needed) * needed} before the run starts (it decides "
                "which documents share a row), or a smaller layout",
            )
        )
    if seq_length % packing.pad_multiple:
        above = -(-seq_length // packing.pad_multiple) * packing.pad_multiple
        problems.append(
            Problem(
                "data.seq_length",
                seq_length,
                f"must be a multiple of data.packing.pad_multiple = {packing.pad_multiple}",
                f"choose {above}, or another pad_multiple",
            )
        )
    if micro_batch_size != 1:
        problems.append(
            Problem(
                "train.micro_batch_size",
                micro_batch_size,
                "must be 1 with data.packing.enabled: a packed micro-batch is one row",
                "set it to 1 and make data.seq_length longer",
            )
        )
    return problems


def _overlong_needs(packing: PackingConfig) -> Iterator[Problem]:
    if packing.overlong != "refuse":
        yield Problem(
            "data.packing.overlong",
            packing.overlong,
            "only packed rows hold pieces of a conversation, but data.packing.enabled = false",
            "set data.packing.enabled true, or choose refuse",
        )


def _domains(domains: Sequence[DomainConfig]) -> Iterator[Problem]:
    counts = Counter(domain.name for domain in domains)
    for number, domain in enumerate(domains):
        where = f"data.domains[{number}]"
        if not domain.name or counts[domain.name] > 1:
            yield Problem(
                f"{where}.name", domain.name, "must be given and unique", "give each domain a name of its own"
            )
        if not domain.paths:
            yield Problem(f"{where}.paths", [], "the domain has no file", "list at least one, or remove it")
        yield from _one_of_two(where, Ask(domain.weight, domain.epochs))


def _one_of_two(where: str, ask: Ask) -> Iterator[Problem]:
    if ask.weight is not None and ask.epochs is not None:
        yield Problem(
            f"{where}.epochs", ask.epochs, f"stands beside weight = {ask.weight}", "keep one of the two"
        )
    for name, value in (("weight", ask.weight), ("epochs", ask.epochs)):
        if value is not None and value < 0:
            yield Problem(f"{where}.{name}", value, "must be at least 0", "use 0 to leave a domain out")


def _names(where: str, domains: Sequence[DomainConfig], phase: MixturePhase) -> Iterator[Problem]:
    known = [domain.name for domain in domains]
    counts = Counter(share.name for share in phase.domains)
    for number, share in enumerate(phase.domains):
        here = f"{where}.domains[{number}]"
        if share.name not in known:
            near = difflib.get_close_matches(share.name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"the domains are {', '.join(known) or 'none'}"
            yield Problem(f"{here}.name", share.name, "is no domain of data.domains", remedy)
        elif counts[share.name] > 1:
            yield Problem(f"{here}.name", share.name, "stands twice in this phase", "keep one of them")
        yield from _one_of_two(here, Ask(share.weight, share.epochs))


def _amounts(where: str, domains: Sequence[DomainConfig], phase: MixturePhase) -> Iterator[Problem]:
    asks = asks_of(domains, phase)
    weights = [ask.weight for ask in asks if ask.weight is not None]
    epochs = [ask.epochs for ask in asks if ask.epochs is not None]
    if not domains or any(min(given, default=0) < 0 for given in (weights, epochs)):
        return  # said elsewhere
    if weights and epochs:
        yield Problem(
            where,
            None,
            "some domains have weights, others epochs: the shares of the tokens do not follow",
            "give all of a phase the same kind",
            show_value=False,
        )
    elif not sum(weights) and not sum(epochs):
        yield Problem(
            where,
            None,
            f"the {'epochs' if epochs else 'weights'} sum to zero: no domain gets any token",
            "give at least one domain a weight or epochs above 0",
            show_value=False,
        )
    elif phase.text_share is not None and epochs:
        yield Problem(
            f"{where}.text_share",
            phase.text_share,
            "epochs already fix the shares",
            "use weights, or remove it",
        )
    elif phase.text_share is not None:
        sides = (("text", phase.text_share), ("multimodal", 1.0 - phase.text_share))
        for side, share in sides:
            given = sum(a.weight or 0.0 for a, d in zip(asks, domains) if d.modality == side)
            if share > 0 and not given:
                yield Problem(
                    f"{where}.text_share",
                    phase.text_share,
                    f"leaves {share:g} to {side} domains, but none of them has a weight above 0",
                    f"add a domain with modality: {side}, or give one a weight",
                )


def _length(
    where: str, domains: Sequence[DomainConfig], phase: MixturePhase, last: bool
) -> Iterator[Problem]:
    if in_epochs(asks_of(domains, phase)):
        if phase.tokens is not None:
            yield Problem(
                f"{where}.tokens",
                phase.tokens,
                "the epochs already fix the length",
                "use weights, or remove it",
            )
    elif phase.tokens is None and not last:
        yield Problem(
            f"{where}.tokens", None, "only the last phase may go without a length", "give its row tokens"
        )
