"""The training data of a run as one loader: JSONL files one row each, or domains after a data plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from megatron_vl.config.mixture import DomainConfig
from megatron_vl.config.schema import DataConfig, RunConfig
from megatron_vl.data.bad_samples import BadSampleLog
from megatron_vl.data.lengths import Source
from megatron_vl.data.loader import Loader, Place, train_loader
from megatron_vl.data.packed import (
    DomainSources,
    PackedMicroBatches,
    open_plan,
    order_description,
    packed_loader,
)
from megatron_vl.data.plan_report import record_of, report_lines
from megatron_vl.data.plan_settings import PlanSettings, training_domains
from megatron_vl.data.row_plan import RowPlan
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.sources.megatron_bin import TokenRule
from megatron_vl.data.sources.open import open_source


def is_planned(data: DataConfig) -> bool:
    """Whether a data plan is made ahead: for packed rows and for mixtures."""
    return data.packing.enabled or bool(data.domains) or bool(data.mixture)


def plan_ahead(config: RunConfig, num_steps: int, dp_size: int, say: Callable[[str], None]) -> None:
    """What one process of the run does before the others open the data: index files and lengths, make the plan.

    The plan is printed and stored in ``data_plan.json`` of the run folder. It may take long; ``say`` is called every
    few seconds.
    """
    sources = open_domains(config, say)
    try:
        plan = plan_of(config, sources, num_steps, True, say)
        say("\n".join(report_lines(plan, dp_size)))
        (Path(config.run_dir) / "data_plan.json").write_text(json.dumps(record_of(plan), indent=1) + "\n")
    finally:
        for source in sources:
            source.close()


def training_loader(
    config: RunConfig, place: Place, num_steps: int, timeout_seconds: float, log: BadSampleLog
) -> Loader:
    """The loader of a run's training data for the rank at ``place``; planned data after `plan_ahead`.

    log: gets what a source refused when it was indexed.
    """
    data, train = config.data, config.train
    batch = (train.micro_batch_size, train.global_batch_size)
    if not is_planned(data):
        return train_loader(
            data, config.model, place, *batch, num_steps=num_steps, timeout_seconds=timeout_seconds
        )
    sources = open_domains(config, _silent)
    for source in sources:
        log.add(source.refused())
    plan = plan_of(config, sources, num_steps, False, _silent)
    rows = RowBuilder(data, config.model)
    micro_batches = PackedMicroBatches(DomainSources(sources), plan, rows, place, train.micro_batch_size)
    return packed_loader(micro_batches, timeout_seconds=timeout_seconds)


def plan_of(
    config: RunConfig, sources: list[Source], num_steps: int, first: bool, say: Callable[[str], None]
) -> RowPlan:
    """The plan over the opened domains. first: this process builds what is missing."""
    data = config.data
    domains = training_domains(data.train, data.domains)
    size = config.train.global_batch_size
    settings = PlanSettings.of(data, data.packing, domains, data.mixture, config.model, size)
    readings = [_reading(domain) for domain in domains]
    folder = Path(config.run_dir)
    return open_plan(
        settings, sources, data, data.packing, config.model, folder, num_steps, first, say, readings
    )


def open_domains(config: RunConfig, say: Callable[[str], None]) -> list[Source]:
    """The samples of each domain; indexes of files are kept in the run folder, or in packing.index_dir."""
    domains = training_domains(config.data.train, config.data.domains)
    return [open_domain(domain, config, str(files_folder(config)), say) for domain in domains]


def open_domain(
    domain: DomainConfig, config: RunConfig, cache_dir: str | None, say: Callable[[str], None]
) -> Source:
    """The samples of one domain. cache_dir: for the indexes of its files; None = keep none."""
    return open_source(
        domain.paths,
        domain.format,
        cache_dir=cache_dir,
        index_workers=max(1, config.data.packing.index_workers),
        say=say,
        action_schema=domain.action_schema,
        token_rule=TokenRule.for_model(config.model),
    )


def files_folder(config: RunConfig) -> Path:
    """Where the indexes of a run's files are kept."""
    return Path(config.data.packing.index_dir or Path(config.run_dir) / "data_index") / "files"


def _reading(domain: DomainConfig) -> str:
    """How the files of a domain are read, as far as it decides lengths: its form, and what its schema says."""
    if domain.action_schema is None:
        return domain.format
    return f"{domain.format} {hashlib.sha256(Path(domain.action_schema).read_bytes()).hexdigest()}"


def _silent(line: str) -> None:
    """For ranks that open what the first one has made and told of."""


def sample_order(config: RunConfig, loader: Loader) -> str:
    """What decides which samples step k trains on; it must not change when a run is resumed.

    Contents count, places and times do not: a copy of the data is the same data, an edited file is not.
    """
    micro_batches = loader.micro_batches
    if isinstance(micro_batches, PackedMicroBatches):
        return order_description(micro_batches.plan)
    source = micro_batches.source
    files = [
        f"{Path(f['path']).name} ({f['samples']} samples, {f['bytes']} bytes, sha256 {sha256[:16]})"
        for f, sha256 in zip(source.describe(), source.digests(), strict=True)
    ]
    return f"{', '.join(files)} with seed {config.data.seed} and {config.train.global_batch_size} rows a step"
